"""The steps of a packed program by what they cost: steps with one key do the same work on the same shapes.

The key of a step is all that the executor is told of it, but for where its values lie. A space of architectures has few
keys, though it has many programs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nasplat.errors import UnsupportedError
from nasplat.packed.graph import Program
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


def step_sizes(key: str) -> dict[str, int]:
    """The numbers in a key by their names: ``{"channels": 8, "height": 14}``. What a step comes with counts as 1."""
    parts = [part.partition("=") for part in key.split(" ") if "=" in part]
    return {(name if name != "with" else value): (int(value) if name != "with" else 1) for name, _, value in parts}


def step_seconds(program: PackedProgram, x: NDArray[np.float32], passes: int) -> NDArray[np.float64]:
    """Seconds of each step, shape ``(passes, steps)``: run one after the other as always, on one thread.

    So each step finds the caches as it does in the network.

    Args:
        program: Any.
        x: One example ``(1, channels, height, width)``.
        passes: Runs of the whole program.

    Raises:
        UnsupportedError: Numba is not installed.
    """
    timed: Callable[[NDArray[np.float32], int], NDArray[np.float64]] | None = getattr(program.engine, "timed", None)
    if timed is None:
        raise UnsupportedError(
            "steps are timed on the compiled engine, which needs Numba: pip install 'nasplat[packed]'"
        )
    return timed(x, passes)


def timed_steps(program: PackedProgram, passes: int = 12) -> dict[str, float]:
    """Milliseconds of a program's steps by their keys, for one example on one thread.

    Of each step the least of all passes counts, since what disturbs only ever adds; of several steps with one key, the
    mean.

    Args:
        program: Any.
        passes: As of :func:`step_seconds`.

    Raises:
        UnsupportedError: Numba is not installed.
    """
    x = np.random.default_rng(0).standard_normal((1, *program.input_shape), np.float32)
    found: dict[str, list[float]] = {}
    for key, seconds in zip(step_keys(program), step_seconds(program, x, passes).min(0).tolist(), strict=True):
        found.setdefault(key, []).append(seconds * 1e3)
    return {key: statistics.fmean(values) for key, values in found.items()}


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
