"""The compiled engine: a program laid out for this processor, and memory for as many examples as are under way.

Needs Numba. Examples of a batch go to threads of this process, which compiled code runs in without holding the
interpreter's lock; there is no OpenMP, so a process may fork at any time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nasplat.errors import InvalidInputError
from nasplat.packed.compiling import execute
from nasplat.packed.engine import Step
from nasplat.packed.graph import INPUT, PICK, Argmax, Program, check_program
from nasplat.packed.kernels import fields, intrinsics
from nasplat.packed.plan import Plan, make_plan

_ALIGNMENT = 64


class _Memory(NamedTuple):
    """Bytes, and the first aligned address among them."""

    array: NDArray[np.uint8]
    start: int


def _aligned(size: int) -> _Memory:
    """So many bytes from an aligned address on, all zero."""
    array = np.zeros(size + _ALIGNMENT, np.uint8)
    return _Memory(array, -(-array.ctypes.data // _ALIGNMENT) * _ALIGNMENT)


class _Arenas:
    """Memory for one example each, kept for the next call."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: list[_Memory] = []

    def take(self) -> _Memory:
        """An arena that nobody else uses until it is given back."""
        try:
            # Atomic, as append is. What is in use during a fork is not in the list.
            return self._free.pop()
        except IndexError:
            return _aligned(self._size)

    def give_back(self, arena: _Memory) -> None:
        """Keep it for the next call."""
        self._free.append(arena)


_NOTHING = np.zeros(0, np.float32)

_QUICK_CALL = 0.1
"""The share of the calls that is taken for undisturbed."""

_AT_ONCE = 16
"""Examples of one call of compiled code: Ctrl-C is heard between calls."""


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads that stay, at most one a processor. After a fork a process has another number, and gets its own."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="nasplat-packed")


class Compiled:
    """Runs a program with the compiled executor.

    Args:
        program: Any.

    Attributes:
        plan: The program's layout.
    """

    def __init__(self, program: Program) -> None:
        self.plan: Plan = make_plan(program, intrinsics.ISA)
        self._execute = execute()
        self._consts = _aligned(len(self.plan.consts))
        offset = self._consts.start - self._consts.array.ctypes.data
        self._consts.array[offset : offset + len(self.plan.consts)] = self.plan.consts
        self._arenas = _Arenas(self.plan.arena_bytes)
        self._input = self.plan.values[INPUT]
        self._output = self.plan.values[program.output]
        # Bytes of an example, and where they lie.
        self._in = 4 * prod(self._input.shape), self._input.at
        self._out = 4 * prod(self._output.shape), self._output.at
        shapes = check_program(program)
        self._choices = {one.name: shapes[one.x][0] for one in program.operations if isinstance(one, Argmax)}

    @property
    def steps(self) -> tuple[Step, ...]:
        """One a row of the table."""
        return self.plan.steps

    def run(self, x: NDArray[np.float32], threads: int = 1) -> NDArray[np.float32]:
        """See :class:`nasplat.packed.engine.Engine`."""
        if x.dtype != np.float32 or not (x.flags.c_contiguous and x.flags.writeable):
            # The compiled code takes no other arrays, though it leaves this one as it is.
            x = np.require(x, np.float32, ("C", "W"))
        if x.shape[1:] != self._input.shape:
            raise InvalidInputError(
                f"the input has shape {x.shape}; legal: (n, {', '.join(map(str, self._input.shape))})"
            )
        y = np.empty((len(x), *self._output.shape), np.float32)
        threads = min(threads, len(x))
        if threads <= 1:
            self._run(x, y)
        else:
            bounds = [len(x) * part // threads for part in range(threads + 1)]
            parts = [slice(begin, end) for begin, end in pairwise(bounds)]
            # The first part is this thread's own.
            others = [_pool(os.getpid()).submit(self._run, x[part], y[part]) for part in parts[1:]]
            self._run(x[parts[0]], y[parts[0]])
            for other in others:
                other.result()
        return y

    def _run(self, x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
        arena = self._arenas.take()
        try:
            for first in range(0, len(x), _AT_ONCE):
                part = slice(first, first + _AT_ONCE)
                self._call(arena.start, 0, len(self.plan.table), 1, x[part], y[part])
        finally:
            self._arenas.give_back(arena)

    def _call(
        self,
        arena: int,
        first: int,
        last: int,
        turns: int,
        x: NDArray[np.float32] = _NOTHING,
        y: NDArray[np.float32] = _NOTHING,
    ) -> None:
        examples = len(x) if x.size else 1
        given, taken = (x.reshape(-1), *self._in), (y.reshape(-1), *self._out)
        self._execute(self.plan.table, first, last, turns, self._consts.start, arena, examples, *given, *taken)

    def rows(self, x: NDArray[np.float32]) -> Iterator[tuple[Step, Callable[[int], None]]]:
        """Each step of one example with a call that runs it so many times over, for timing.

        Args:
            x: ``(1, channels, height, width)``.
        """
        memory = _aligned(self.plan.arena_bytes)
        self._call(memory.start, 0, 0, 1, x)
        for index, step in enumerate(self.steps):
            # Its inputs are there now, and running it changes none of them.
            yield step, partial(self._call, memory.start, index, index + 1)
            self._call(memory.start, index, index + 1, 1)

    def timed(self, x: NDArray[np.float32], passes: int) -> NDArray[np.float64]:
        """Seconds of each step, run one after the other as always: shape ``(passes, steps)``.

        What a call of compiled code takes by itself is taken off.

        Args:
            x: ``(1, channels, height, width)``.
            passes: Runs of the whole program.
        """
        memory = _aligned(self.plan.arena_bytes)
        table, consts, arena = self.plan.table, self._consts.start, memory.start
        no_images = (1, _NOTHING, *self._in, _NOTHING, *self._out)
        execute, clock = self._execute, time.perf_counter
        calls, taken = (np.zeros((passes, len(table))) for _ in range(2))
        for number in range(passes):
            self._call(arena, 0, 0, 1, x)
            for index in range(len(table)):
                begin = clock()
                execute(table, index, index, 1, consts, arena, *no_images)
                middle = clock()
                execute(table, index, index + 1, 1, consts, arena, *no_images)
                taken[number, index] = clock() - middle
                calls[number, index] = middle - begin
        return np.maximum(taken - np.quantile(calls, _QUICK_CALL), 0.0)

    def trace(self, values: Mapping[str, NDArray[Any]]) -> Iterator[tuple[Step, NDArray[Any] | None]]:
        """See :class:`nasplat.packed.engine.Engine`."""
        memory = _aligned(self.plan.arena_bytes)
        start = memory.start - memory.array.ctypes.data

        def view(name: str) -> NDArray[Any]:
            place = self.plan.values[name]
            kind, shape = (np.int32, ()) if place.shape == PICK else (np.float32, place.shape)
            count = int(np.prod(shape, dtype=np.int64))
            begin = start + place.at
            return memory.array[begin : begin + 4 * count].view(kind).reshape(shape)

        for index, step in enumerate(self.steps):
            for number, name in enumerate(step.inputs):
                # A convolution reads what was packed; its input itself may be gone by then.
                at = self.plan.table[index, fields.X_AT]
                if name in values and (number > 0 or at == self.plan.values[name].at):
                    if name in self._choices and not 0 <= int(values[name]) < self._choices[name]:
                        raise InvalidInputError(
                            f"the pick {name!r} is {int(values[name])}; legal: from 0 to {self._choices[name] - 1}"
                        )
                    view(name)[...] = values[name]
            self._call(memory.start, index, index + 1, 1)
            yield step, None if step.output is None else view(step.output).copy()
