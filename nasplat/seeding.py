"""The global generators: seeded, saved and restored in this one place.

nasplat's own code takes its randomness as an argument. Layers, data sets and users' functions draw from the global
generators of torch, NumPy and Python, so a trial runs with those seeded, and its checkpoint holds them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def get_state() -> dict[str, Any]:
    """The state of every global generator, as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
    }


def set_state(state: Mapping[str, Any]) -> None:
    """Bring every global generator to a state of :func:`get_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every global generator, and give them back as they were.

    Args:
        seed: In [0, 2**32).
    """
    torch_before, python_before, numpy_before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    cuda_before = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    # Not torch.manual_seed: it queues a call, with a formatted stack, for every accelerator that is not there.
    torch.default_generator.manual_seed(seed)
    if cuda_before:
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        torch.set_rng_state(torch_before)
        random.setstate(python_before)
        np.random.set_state(numpy_before)  # noqa: NPY002
        if cuda_before:
            torch.cuda.set_rng_state_all(cuda_before)
