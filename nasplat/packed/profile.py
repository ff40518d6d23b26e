"""Where a packed program spends its time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.packed.graph import BinaryConv, check_program
from nasplat.packed.program import PackedProgram

_APART = "the two are more than a fifth apart: something else ran on this machine, or the call itself takes its share"


@dataclass(frozen=True)
class StepProfile:
    """One step of a program.

    Attributes:
        name: Of the value that it makes.
        kind: What it does.
        microseconds: For one example: the least of several measurements of many runs each.
        bit_macs: Multiply-accumulates of bits; 0 in other steps than binary convolutions.
        macs: Of real numbers; likewise.
        share_of_peak: Of :attr:`Profile.popcount_peak`; 0 where no bits are multiplied. Above 1 where a kernel does
            better than count bits.
    """

    name: str
    kind: str
    microseconds: float
    bit_macs: int
    macs: int
    share_of_peak: float


@dataclass(frozen=True)
class Profile:
    """Where the time of one example goes, on one thread of this machine.

    Attributes:
        steps: In order. A binary convolution does not include the packing of its input, which has a step of its own and
            may serve several.
        microseconds: Of the whole program, measured in one piece.
        bit_macs: Of the whole program.
        popcount_peak: Bit-MACs per second of XOR, population count and addition with operands in registers.
        lookup_peak: Likewise of table lookup and addition; None without such an instruction.
        isa: Instruction set of the kernels.
        cpu: The processor by the compiler's name.
        arena_bytes: Memory for one example's values.
        const_bytes: Weights and tables as they are laid out for this processor.
    """

    steps: tuple[StepProfile, ...]
    microseconds: float
    bit_macs: int
    popcount_peak: float
    lookup_peak: float | None
    isa: str
    cpu: str
    arena_bytes: int
    const_bytes: int

    def by_kind(self) -> dict[str, float]:
        """Microseconds by kind of step, the largest first."""
        total: dict[str, float] = {}
        for step in self.steps:
            total[step.kind] = total.get(step.kind, 0.0) + step.microseconds
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def __str__(self) -> str:
        """A table."""
        width = max((len(step.name) for step in self.steps), default=4)
        lines = [f"{'step':<{width}}  {'kind':<12} {'us':>9} {'share':>6} {'Mbit-MAC':>9} {'of peak':>7}"]
        whole = sum(step.microseconds for step in self.steps) or 1.0
        for step in self.steps:
            of_peak = f"{step.share_of_peak:>7.0%}" if step.bit_macs else f"{'':>7}"
            lines.append(
                f"{step.name:<{width}}  {step.kind:<12} {step.microseconds:>9.1f} {step.microseconds / whole:>6.1%} "
                f"{step.bit_macs / 1e6:>9.2f} {of_peak}"
            )
        kinds = ", ".join(f"{kind} {time / whole:.0%}" for kind, time in self.by_kind().items())
        lines += [
            "",
            f"{self.microseconds:.0f} us for the whole program, {whole:.0f} us for its steps one by one: {kinds}",
            f"{self.bit_macs / 1e6:.1f} Mbit-MAC, {self.bit_macs / self.microseconds / 1e3:.0f} Gbit-MAC/s; the peak "
            f"of XOR and population count is {self.popcount_peak / 1e9:.0f} Gbit-MAC/s"
            + ("" if self.lookup_peak is None else f", of table lookups {self.lookup_peak / 1e9:.0f}")
            + f" ({self.isa} on {self.cpu}, one thread)",
            *([_APART] if abs(self.microseconds - whole) > whole / 5 else []),
            f"memory: {self.arena_bytes:,} bytes for values, {self.const_bytes:,} for weights and tables",
        ]
        return "\n".join(lines)


def profile(program: PackedProgram, *, seconds: float = 0.01, passes: int = 5) -> Profile:
    """Measure each step of a program, and the whole.

    The input is random. Figures to compare candidates by need a quiet machine.

    Args:
        program: Any.
        seconds: Time of one measurement of one step, about.
        passes: Measurements of each step; the least counts.

    Raises:
        UnsupportedError: Numba is not installed.
    """
    try:
        from nasplat.packed.compiled import Compiled
        from nasplat.packed.compiling import peaks
        from nasplat.packed.kernels.intrinsics import ISA, target_name
    except ImportError as error:
        raise UnsupportedError(
            "profile measures the compiled engine, which needs Numba: pip install 'nasplat[packed]'"
        ) from error
    if not isinstance(program, PackedProgram):
        raise InvalidInputError(f"profile takes a PackedProgram, of pack or PackedProgram.load; got {program!r}")
    engine = program.engine
    assert isinstance(engine, Compiled)
    x = np.random.default_rng(0).standard_normal((1, *program.input_shape), np.float32)
    shapes = check_program(program.program)
    macs = {
        one.name: (isinstance(one, BinaryConv), one.macs(tuple(shapes[name] for name in one.inputs)))
        for one in program.program.operations
    }
    peak = peaks()
    steps = []

    def whole(turns: int) -> None:
        for _ in range(turns):
            engine.run(x)

    # Before and after the steps: other work on the machine may begin or end meanwhile.
    taken_before = _least(whole, seconds, passes)
    for step, call in engine.rows(x):
        taken = _least(call, seconds, passes)
        bits = sum(count for name in step.operations for binary, count in [macs[name]] if binary)
        steps.append(
            StepProfile(
                name=step.name,
                kind=step.kind,
                microseconds=taken * 1e6,
                bit_macs=bits,
                macs=sum(count for name in step.operations for binary, count in [macs[name]] if not binary),
                share_of_peak=bits / taken / peak.popcount,
            )
        )
    return Profile(
        steps=tuple(steps),
        microseconds=min(taken_before, _least(whole, seconds, passes)) * 1e6,
        bit_macs=sum(step.bit_macs for step in steps),
        popcount_peak=peak.popcount,
        lookup_peak=peak.lookup,
        isa=ISA.name,
        cpu=target_name(),
        arena_bytes=engine.plan.arena_bytes,
        const_bytes=len(engine.plan.consts),
    )


def _least(call: Callable[[int], Any], seconds: float, passes: int) -> float:
    """Seconds of one turn."""
    turns = 1
    while True:
        start = time.perf_counter()
        call(turns)
        taken = time.perf_counter() - start
        if taken >= seconds / 2 or turns >= 1 << 20:
            break
        turns = max(2 * turns, min(16 * turns, int(turns * seconds / max(taken, 1e-9))))
    times = []
    for _ in range(passes):
        start = time.perf_counter()
        call(turns)
        times.append((time.perf_counter() - start) / turns)
    return min(times)
