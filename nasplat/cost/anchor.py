"""The anchor: a small network that never changes, timed beside every candidate to see whether the machine is the same.

It fits the caches that a core has to itself. What others do to the caches and the memory that all share is seen by
reading memory. What both took on this machine before is kept beside the bench's locks, so that a load which lasts is
seen too.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nasplat.identity import canonical, describe
from nasplat.nn.binary import BinaryConv2d
from nasplat.runtimes.runtime import Runtime, Session
from nasplat.seeding import seeded

KEPT = 200
"""Measurements whose anchors are remembered, per runtime and number of threads."""

QUICK_SHARE = 0.05
"""The share of remembered anchors that were as quick as the reference: so many measurements of a machine that got
slower for good are flagged until they outvote those before."""

ENOUGH = 5
"""Measurements on record from which on it is trusted."""

VERSION = 1


def anchor_network() -> tuple[nn.Module, Tensor]:
    """The network, in evaluation mode, and its input. The same on every machine.

    Real and binary convolutions, plain and grouped: what runtimes are good and bad at.
    """
    with seeded(0):
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)]
        for groups in (1, 8):
            layers += [BinaryConv2d(32, 32, 3, padding=1, groups=groups), nn.BatchNorm2d(32)]
        layers += [nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
        model = nn.Sequential(*layers).eval()
        return model.requires_grad_(False), torch.randn(1, 3, 32, 32)


_sessions: dict[str, Session] = {}


def anchor_session(runtime: Runtime, threads: int) -> Session:
    """The anchor on a runtime, made once a process."""
    key = canonical([describe(runtime), threads])
    if key not in _sessions:
        model, example = anchor_network()
        _sessions[key] = runtime.load(runtime.export(model, example), example, threads)
    return _sessions[key]


READ_BYTES = 4 << 20
"""Memory that is read: more than the caches of a core, less than those that cores share."""


@lru_cache(maxsize=1)
def _memory() -> Tensor:
    return torch.ones(READ_BYTES // 4)


def read_seconds() -> float:
    """Time to read :data:`READ_BYTES` of memory, in seconds: the quicker of two."""
    memory, times = _memory(), []
    for _ in range(2):
        begin = time.perf_counter()
        memory.sum()
        times.append(time.perf_counter() - begin)
    return min(times)


class AnchorRecord:
    """What the anchor took on this machine before.

    Args:
        folder: The bench's.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"anchors-{VERSION}.json"

    def _read(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            held = json.loads(self._path.read_text())
            if isinstance(held, dict):
                return held
        return {}

    def reference_ms(self, key: str) -> float:
        """What it takes where nothing disturbs, as far as earlier measurements tell; infinite where there are none.

        Args:
            key: Names runtime, threads and processor.
        """
        held = sorted(self._held(key))
        return held[int(QUICK_SHARE * (len(held) - 1))] if held else math.inf

    def is_young(self, key: str) -> bool:
        """Whether too little is on record to tell a quiet machine from a busy one."""
        return len(self._held(key)) < ENOUGH

    def _held(self, key: str) -> list[float]:
        """What the file has under a key. It may be damaged, but must not stop a measurement."""
        held = self._read().get(key)
        good = (
            [value for value in held if type(value) in (int, float) and 0 < value < math.inf]
            if isinstance(held, list)
            else []
        )
        return [float(value) for value in good]

    def add(self, key: str, value: float) -> None:
        """Remember the anchor of one measurement, in ms. Only while the bench is held."""
        held = self._read()
        held[key] = [*self._held(key), value][-KEPT:]
        handle, temporary = tempfile.mkstemp(dir=self._path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(held))
        Path(temporary).replace(self._path)
