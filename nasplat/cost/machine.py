"""The machine that measures: what it is, and holding it still."""

from __future__ import annotations

import gc
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import torch

from nasplat.cost.bench import pinned

ORDINARY_CACHE = 1 << 20
"""Bytes of the second-level cache of a core, where the system does not tell."""


@contextmanager
def steady(threads: int, processors: Sequence[int]) -> Iterator[None]:
    """A fixed number of torch threads, these processors (empty: any), and no garbage collection."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        with pinned(processors):
            yield
    finally:
        if collecting:
            gc.enable()
        torch.set_num_threads(before)


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's name and widest vector instructions, as far as the system tells."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def governor(processors: Sequence[int]) -> str:
    """The frequency governor of a processor, where the system tells."""
    number = processors[0] if processors else 0
    try:
        return Path(f"/sys/devices/system/cpu/cpu{number}/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return "unknown"


@lru_cache(maxsize=1)
def own_cache_bytes() -> int:
    """Size of the second-level cache, the largest that a core has to itself."""
    for cache in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        with suppress(OSError, ValueError, KeyError):
            if (cache / "level").read_text().strip() == "2":
                size = (cache / "size").read_text().strip()
                return int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]]
    return ORDINARY_CACHE
