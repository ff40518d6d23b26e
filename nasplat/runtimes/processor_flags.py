"""Vector instructions of this machine's processor, as the system tells."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

WIDTHS = {"avx512f": "AVX512", "avx2": "AVX2", "avx": "AVX", "sse4_2": "SSE4.2", "sve": "SVE", "asimd": "NEON"}
"""Flag and name of vector instructions, widest first."""

DOTS = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "i8mm", "asimddp")
"""Flags of instructions that add four products of 8-bit numbers to a 32-bit sum."""


@lru_cache(maxsize=1)
def flags() -> frozenset[str]:
    """The processor's flags; none where the system has no ``/proc/cpuinfo``."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):  # x86, ARM
            return frozenset(value.split())
    return frozenset()


def instructions() -> str:
    """The widest vector instructions; ``unknown`` where the system does not tell."""
    return next((name for flag, name in WIDTHS.items() if flag in flags()), "unknown")


def dot_product() -> str:
    """The flags of dot products of 8-bit numbers (VNNI), ``none``, or ``unknown`` where the system does not tell."""
    if not flags():
        return "unknown"
    return " ".join(flag for flag in DOTS if flag in flags()) or "none"
