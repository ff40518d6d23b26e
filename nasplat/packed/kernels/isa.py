"""What a processor offers to the kernels: width of a vector, table lookup, population count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LookupKind = Literal["avx512", "avx2", "ssse3", "neon", "none"]


@dataclass(frozen=True)
class Isa:
    """One instruction set as the kernels see it.

    Attributes:
        name: For a person, and recorded with each measurement.
        width: Bytes of a vector.
        lookup: The instruction that looks 16-entry tables of bytes up, of which a binary convolution can be made.
        popcount: Whether there is a vector instruction that counts the bits of 32-bit words.
        registers: Vectors that the register file holds.
    """

    name: str
    width: int
    lookup: LookupKind
    popcount: bool
    registers: int

    @property
    def lanes(self) -> int:
        """32-bit numbers in a vector."""
        return self.width // 4


AVX512_VPOPCNTDQ = Isa("avx512-vpopcntdq", 64, "avx512", True, 32)
AVX512 = Isa("avx512", 64, "avx512", False, 32)
AVX2 = Isa("avx2", 32, "avx2", False, 16)
SSSE3 = Isa("ssse3", 16, "ssse3", False, 16)
NEON = Isa("neon", 16, "neon", False, 32)
PORTABLE = Isa("portable", 16, "none", False, 16)

ISAS = (AVX512_VPOPCNTDQ, AVX512, AVX2, SSSE3, NEON, PORTABLE)
"""All, the widest first."""


def isa_of(triple: str, features: str) -> Isa:
    """The best of :data:`ISAS` for a compiler target.

    Args:
        triple: LLVM's, e.g. ``"x86_64-unknown-linux-gnu"``.
        features: LLVM's, e.g. ``"+avx,+avx2,-avx512f"``; the last word on a feature counts.
    """
    if triple.startswith(("aarch64", "arm64")):
        # Part of every 64-bit ARM.
        return NEON
    has: dict[str, bool] = {}
    for feature in features.split(","):
        if feature.startswith(("+", "-")):
            has[feature[1:]] = feature[0] == "+"
    if not triple.startswith("x86_64"):
        return PORTABLE
    if has.get("avx512bw") and has.get("avx512vl") and has.get("avx512dq"):
        return AVX512_VPOPCNTDQ if has.get("avx512vpopcntdq") else AVX512
    if has.get("avx2") and has.get("fma"):
        return AVX2
    return SSSE3 if has.get("ssse3") else PORTABLE
