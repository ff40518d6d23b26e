"""The steps of a packed program by what they cost: steps with one key do the same work on the same shapes.

The key of a step is all that the executor is told of it, but for where its values lie. A space of architectures has few
keys, though it has many programs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from nasplat.errors import UnsupportedError
from nasplat.packed.engine import Engine, Step
from nasplat.packed.graph import Program
from nasplat.packed.profile import _least
from nasplat.packed.program import PackedProgram

PRESENT = ("PICK_AT", "FACTOR_AT", "BASE_AT")
"""Arrays that a step may be without, which makes it another step."""


def step_keys(program: PackedProgram) -> tuple[str, ...]:
    """Keys of a program's steps on this machine, in order: ``CONV channels=8 height=14 ...``.

    Raises:
        UnsupportedError: Numba is not installed: only the compiled engine has steps that are worth timing.
    """
    return _keys(program.program)


def step_kind(key: str) -> str:
    """What the steps with a key do: ``CONV lookup``, ``PACK popcount``, ``POOL``."""
    parts = key.split(" ")
    return " ".join(part for part in parts[:2] if "=" not in part)


def timed_steps(
    program: PackedProgram, wanted: Collection[str], seconds: float = 0.001, passes: int = 3
) -> Iterator[tuple[str, float]]:
    """Keys of a program's steps with milliseconds of one run, for one example on one thread.

    Args:
        program: Any.
        wanted: Keys to measure; each is measured at its first step.
        seconds: Of one reading, about.
        passes: Readings of each; the least counts, since what disturbs only ever adds.
    """
    engine = program.engine
    x = np.random.default_rng(0).standard_normal((1, *program.input_shape), np.float32)
    left = set(wanted)
    for key, (_, call) in zip(step_keys(program), _rows(engine, x), strict=True):
        if key in left:
            left.remove(key)
            yield key, _least(call, seconds, passes) * 1e3


def _rows(engine: Engine, x: NDArray[np.float32]) -> Iterator[tuple[Step, Callable[[int], None]]]:
    rows = getattr(engine, "rows", None)
    if rows is None:
        raise UnsupportedError(
            "steps are timed on the compiled engine, which needs Numba: pip install 'nasplat[packed]'"
        )
    found: Iterator[tuple[Step, Callable[[int], None]]] = rows(x)
    return found


def _keys(program: Program) -> tuple[str, ...]:
    try:
        from nasplat.packed.kernels import fields, intrinsics
        from nasplat.packed.plan import make_plan
    except ImportError as error:
        raise UnsupportedError(
            "the steps of a packed program are those of the compiled engine, which needs Numba: "
            "pip install 'nasplat[packed]'"
        ) from error
    columns = {name: at for name, at in vars(fields).items() if name.isupper() and type(at) is int}
    del columns["COLUMNS"], columns["NOWHERE"], columns["OP"]
    sizes = [(name.lower(), at) for name, at in columns.items() if not name.endswith("_AT") and name != "KIND"]
    optional = [(name[:-3].lower(), columns[name]) for name in PRESENT]
    keys = []
    for row in make_plan(program, intrinsics.ISA).table.tolist():
        opcode = fields.Opcode(row[fields.OP])
        words = [opcode.name]
        if opcode in (fields.Opcode.CONV, fields.Opcode.PACK):
            words.append(fields.KINDS[row[fields.KIND]])
        words += [f"{name}={row[at]}" for name, at in sizes if row[at]]
        words += [f"with={name}" for name, at in optional if opcode is fields.Opcode.CONV and row[at] != fields.NOWHERE]
        keys.append(" ".join(words))
    return tuple(keys)
