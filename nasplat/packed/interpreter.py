"""The program run with NumPy: what every operation means, in the fewest words, and the engine where Numba is missing.

Binary convolutions, pools, sums and moves are exact: they equal PyTorch's result bit for bit. Real convolutions,
linear layers, means, affine maps and sigmoids round in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import singledispatch
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nasplat.errors import InvalidInputError
from nasplat.packed.engine import Step
from nasplat.packed.graph import (
    INPUT,
    Add,
    Affine,
    Argmax,
    BinaryConv,
    Concat,
    Conv,
    Linear,
    Mean,
    Operation,
    Pool,
    Program,
    Shape,
    Shuffle,
    Window,
    check_program,
)

Real: TypeAlias = NDArray[np.float32]
Words: TypeAlias = NDArray[np.uint64]
Kernel: TypeAlias = Callable[..., NDArray[Any]]
"""An operation made ready: the values of its inputs, in order, to its value."""

_WORD = 64
_BLOCK = 1 << 16
"""Numbers in what a convolution works on at a time, so that it stays in the second-level cache."""

_PATCHES = 1 << 24
"""Most numbers in the patches that a convolution copies out at a time, but for one row of pixels."""


class Interpreter:
    """An engine of NumPy alone. It has one step for each operation.

    Attributes:
        program: What it runs.
        steps: One per operation.
    """

    def __init__(self, program: Program) -> None:
        """Make the operations ready.

        Raises:
            InvalidInputError: The program is not legal.
        """
        shapes = check_program(program)
        self.program = program
        self.steps = tuple(Step(op.name, op.KIND, op.inputs, op.name, (op.name,)) for op in program.operations)
        self._kernels = tuple(_kernel(op, tuple(shapes[name] for name in op.inputs)) for op in program.operations)
        self._output_shape = shapes[program.output]
        last = {name: i for i, step in enumerate(self.steps) for name in (step.name, *step.inputs)}
        last[program.output] = len(self.steps)
        self._dead = tuple(
            tuple(name for name in {step.name, *step.inputs} if last[name] == i) for i, step in enumerate(self.steps)
        )

    def run(self, x: Real, threads: int = 1) -> Real:
        """Run the program on a batch.

        Args:
            x: ``(n, *program.input_shape)``, float32.
            threads: Over the batch, 1 or more.

        Returns:
            ``(n, channels, height, width)``, float32.

        Raises:
            InvalidInputError: ``x`` has another shape or type, or ``threads`` is less than 1.
        """
        if x.ndim != 4 or x.shape[1:] != self.program.input_shape or x.dtype != np.float32:
            raise InvalidInputError(
                f"the input has type {x.dtype} and shape {x.shape}; legal: float32 (n, "
                f"{', '.join(map(str, self.program.input_shape))})"
            )
        if threads < 1:
            raise InvalidInputError(f"threads is {threads}; legal: 1 or more")
        out = np.empty((len(x), *self._output_shape), np.float32)

        def example(i: int) -> None:
            out[i] = self._example(x[i])

        if threads == 1 or len(x) < 2:
            for i in range(len(x)):
                example(i)
        else:
            with ThreadPoolExecutor(min(threads, len(x))) as pool:
                for _ in pool.map(example, range(len(x))):
                    pass
        return out

    def trace(self, values: Mapping[str, NDArray[Any]]) -> Iterator[tuple[Step, NDArray[Any]]]:
        """Run one example step by step, each on the given values of its inputs.

        Args:
            values: Of one example by name: ``(channels, height, width)`` float32, an integer of shape ``()`` for a
                pick. At least the program's input.

        Yields:
            Each step and the value that it made. A step reads the given value of an input where there is one, else
            what the step before made of it.

        Raises:
            InvalidInputError: The program's input is not among the values.
        """
        if INPUT not in values:
            raise InvalidInputError(f"values has no {INPUT!r}; legal: at least the program's input")
        made: dict[str, NDArray[Any]] = {}
        for step, kernel, dead in zip(self.steps, self._kernels, self._dead, strict=True):
            inputs = [values[name] if name in values else made[name] for name in step.inputs]
            made[step.name] = _quiet(kernel, inputs)
            yield step, made[step.name]
            for name in dead:
                made.pop(name, None)

    def _example(self, x: Real) -> Real:
        values: dict[str, NDArray[Any]] = {INPUT: x}
        for step, kernel, dead in zip(self.steps, self._kernels, self._dead, strict=True):
            values[step.name] = _quiet(kernel, [values[name] for name in step.inputs])
            for name in dead:
                del values[name]
        return values[self.program.output]


def _quiet(kernel: Kernel, inputs: Sequence[NDArray[Any]]) -> NDArray[Any]:
    # Infinity and NaN are values like others, as in PyTorch: no warning.
    with np.errstate(all="ignore"):
        return kernel(*inputs)


class _Tap(NamedTuple):
    """The outputs for which one tap lies inside the input, and the pixels that they see through it."""

    number: int
    rows: slice
    columns: slice
    input_rows: slice
    input_columns: slice


def _inside(tap: int, start: int, stop: int, stride: int, padding: int, side: int) -> tuple[slice, slice] | None:
    """Of outputs ``start`` to ``stop``, counted from ``start``: those with ``tap`` inside, and what they see."""
    first = max(start, -((tap - padding) // stride))
    last = min(stop - 1, (side - 1 - tap + padding) // stride)
    if first > last:
        return None
    begin = first * stride + tap - padding
    return slice(first - start, last + 1 - start), slice(begin, begin + (last - first) * stride + 1, stride)


def _taps(window: Window, shape: Shape, rows: range) -> Iterator[_Tap]:
    """Taps in order for some rows of the output; those outside the input for all of them are left out."""
    height, width = window.kernel
    columns = [
        _inside(j * window.dilation, 0, window.size[1], window.stride, window.padding[1], shape[2])
        for j in range(width)
    ]
    for i in range(height):
        down = _inside(i * window.dilation, rows.start, rows.stop, window.stride, window.padding[0], shape[1])
        if down is not None:
            for j, across in enumerate(columns):
                if across is not None:
                    yield _Tap(i * width + j, down[0], across[0], down[1], across[1])


def _blocks(window: Window, values: int, patches: int) -> Iterator[range]:
    """Rows of the output to work on at a time, given the numbers of values and of patches for each pixel."""
    height, width = window.size
    rows = max(1, min(_BLOCK // (width * values), _PATCHES // (width * patches)))
    return (range(start, min(start + rows, height)) for start in range(0, height, rows))


def _words(packed: NDArray[np.uint8]) -> Words:
    """Bytes ``(..., n)`` as words ``(ceil(n / 8), ...)``, the missing bytes zero."""
    padded = np.zeros((*packed.shape[:-1], -(-packed.shape[-1] * 8 // _WORD) * 8), np.uint8)
    padded[..., : packed.shape[-1]] = packed
    return np.ascontiguousarray(np.moveaxis(padded.view(np.uint64), -1, 0))


def _pack(bits: NDArray[np.bool_]) -> Words:
    """Bits ``(..., n)``, least significant first, as words ``(ceil(n / 64), ...)``."""
    return _words(np.packbits(bits, axis=-1, bitorder="little"))


def _pixels(bits: NDArray[np.bool_], groups: int) -> Words:
    """The channels of each group and pixel of ``(channels, height, width)`` as words ``(words, groups, ...)``."""
    grouped = bits.reshape(groups, -1, *bits.shape[1:])
    channels = grouped.shape[1]
    if channels >= 8:
        return _pack(np.ascontiguousarray(np.moveaxis(grouped, 1, -1)))
    words = np.zeros((1, groups, *bits.shape[1:]), np.uint64)
    for channel in range(channels):  # many short groups, which `packbits` is slow at
        words[0] |= np.left_shift(grouped[:, channel], channel, dtype=np.uint64)
    return words


def _bit_patches(pixels: Words, channels: int, window: Window, rows: range) -> Words:
    """What each output of some rows sees of pixels of ``channels`` bits, zeros where it is outside.

    Returns:
        ``(words, groups, pixels)``, taps before channels.
    """
    groups, *size = pixels.shape[1:]
    patches = np.zeros((-(-window.taps * channels // _WORD), groups, len(rows), window.size[1]), np.uint64)
    for tap in _taps(window, (channels, *size), rows):
        for i, word in enumerate(pixels):
            seen = word[:, tap.input_rows, tap.input_columns]
            at, shift = divmod(tap.number * channels + i * _WORD, _WORD)
            patches[at, :, tap.rows, tap.columns] |= seen << np.uint64(shift)
            if shift + min(channels - i * _WORD, _WORD) > _WORD:
                patches[at + 1, :, tap.rows, tap.columns] |= seen >> np.uint64(_WORD - shift)
    return patches.reshape(len(patches), groups, -1)


def _ones(both: Callable[..., Any], weight: Words, pixels: Words) -> NDArray[np.int32]:
    """Number of ones in ``both(weight, pixels)``.

    Args:
        both: ``np.bitwise_xor`` or ``np.bitwise_and``.
        weight: ``(words, groups, channels / groups)``.
        pixels: ``(words, groups, pixels)``, or of one group for all.

    Returns:
        ``(groups, channels / groups, pixels)``.
    """
    shape = (*weight.shape[1:], pixels.shape[-1])
    total = np.zeros(shape, np.int32)
    bits, ones = np.empty(shape, np.uint64), np.empty(shape, np.uint8)
    for row, column in zip(weight, pixels, strict=True):
        both(row[:, :, None], column[:, None, :], out=bits)
        total += np.bitwise_count(bits, out=ones)
    return total


def _columns(row: Real | None) -> Real | None:
    return None if row is None else np.ascontiguousarray(row)[:, None]


def _activate(y: Real, scale: Real | None, shift: Real | None, slope: Real | None) -> Real:
    """``y * scale + shift``, then ``y > 0 ? y : slope * y``, each where it is given, for ``(channels, pixels)``."""
    if scale is not None:
        y = y * scale
    if shift is not None:
        y = y + shift
    return y if slope is None else np.where(y > 0, y, slope * y)


@singledispatch
def _kernel(operation: Operation, shapes: tuple[Shape, ...]) -> Kernel:
    raise NotImplementedError(f"the interpreter has no kernel for {type(operation).__name__}")


@_kernel.register
def _binary_conv(operation: BinaryConv, shapes: tuple[Shape, ...]) -> Kernel:
    groups, window, channels = operation.groups, operation.window, operation.channels
    shape = shapes[0]
    group = shape[0] // groups
    threshold = operation.threshold[:, None, None]
    # (experts, words, groups, channels / groups)
    experts = [
        _words(rows).reshape(-1, groups, channels // groups) for rows in np.split(operation.weight, operation.experts)
    ]
    words = len(experts[0])
    scale, slope = _columns(operation.scale), _columns(operation.slope)

    def kernel(x: Real, *others: NDArray[Any]) -> Real:
        pick = int(others[0]) if operation.pick is not None else 0
        factor = others[-1].reshape(channels, 1) if operation.factor is not None else None
        pixels = _pixels(x >= threshold, groups)
        y = np.empty((channels, *window.size), np.float32)
        for rows in _blocks(window, channels, groups * words):
            ones = _ones(np.bitwise_xor, experts[pick], _bit_patches(pixels, group, window, rows))
            # A bit cannot say zero. Outside, patches are 0 bits, and what the weight's ones make of them is taken back.
            inside = np.zeros((len(rows), window.size[1], window.taps), np.bool_)
            for tap in _taps(window, shape, rows):
                inside[tap.rows, tap.columns, tap.number] = True
            missing = ~inside.reshape(-1, window.taps)
            border = np.flatnonzero(missing.any(axis=1))
            if border.size:
                outside = _pack(np.repeat(missing[border], group, axis=1))
                ones[:, :, border] -= _ones(np.bitwise_and, experts[pick], outside[:, None])
            valid = inside.sum(axis=2, dtype=np.int32).reshape(-1) * group
            value = (valid - 2 * ones).reshape(channels, -1).astype(np.float32) * scale
            if factor is not None:
                value = value * factor
            y[:, rows.start : rows.stop] = _activate(value, None, None, slope).reshape(channels, len(rows), -1)
        return y

    return kernel


@_kernel.register
def _conv(operation: Conv, shapes: tuple[Shape, ...]) -> Kernel:
    groups, window, channels = operation.groups, operation.window, operation.channels
    weight = operation.weight.reshape(groups, channels // groups, -1)
    scale, shift, slope = _columns(operation.scale), _columns(operation.shift), _columns(operation.slope)

    def kernel(x: Real) -> Real:
        grouped = x.reshape(groups, -1, *x.shape[1:])
        y = np.empty((channels, *window.size), np.float32)
        for rows in _blocks(window, channels, shapes[0][0] * window.taps):
            patches = np.zeros((groups, grouped.shape[1], window.taps, len(rows), window.size[1]), np.float32)
            for tap in _taps(window, shapes[0], rows):
                patches[:, :, tap.number, tap.rows, tap.columns] = grouped[..., tap.input_rows, tap.input_columns]
            value = np.matmul(weight, patches.reshape(groups, weight.shape[2], -1)).reshape(channels, -1)
            y[:, rows.start : rows.stop] = _activate(value, scale, shift, slope).reshape(channels, len(rows), -1)
        return y

    return kernel


@_kernel.register
def _linear(operation: Linear, shapes: tuple[Shape, ...]) -> Kernel:
    def kernel(x: Real) -> Real:
        y = operation.weight @ x.reshape(-1)
        if operation.shift is not None:
            y = y + operation.shift
        if operation.activation == "relu":
            y = np.maximum(y, np.float32(0))
        elif operation.activation == "sigmoid":
            # Of a number that is not positive, so that it cannot overflow.
            exponential = np.exp(-np.abs(y))
            y = np.where(y < 0, exponential, np.float32(1)) / (1 + exponential)
        return np.asarray(y, np.float32).reshape(-1, 1, 1)

    return kernel


@_kernel.register
def _pool(operation: Pool, shapes: tuple[Shape, ...]) -> Kernel:
    window, shape = operation.window, shapes[0]
    taps = list(_taps(window, shape, range(window.size[0])))

    def largest(x: Real) -> Real:
        y = np.full((shape[0], *window.size), -np.inf, np.float32)
        for tap in taps:
            part = y[:, tap.rows, tap.columns]
            np.maximum(part, x[:, tap.input_rows, tap.input_columns], out=part)
        return y

    inside = np.zeros(window.size, np.float32)
    for tap in taps:
        inside[tap.rows, tap.columns] += 1
    divisor = np.float32(window.taps) if operation.count_padding else inside

    def average(x: Real) -> Real:
        y = np.zeros((shape[0], *window.size), np.float32)
        for tap in taps:
            y[:, tap.rows, tap.columns] += x[:, tap.input_rows, tap.input_columns]
        return y / divisor

    return largest if operation.mode == "max" else average


@_kernel.register
def _mean(operation: Mean, shapes: tuple[Shape, ...]) -> Kernel:
    return lambda x: x.reshape(len(x), -1).mean(axis=1).reshape(-1, 1, 1)


@_kernel.register
def _affine(operation: Affine, shapes: tuple[Shape, ...]) -> Kernel:
    rows = _columns(operation.scale), _columns(operation.shift), _columns(operation.slope)
    return lambda x: _activate(x.reshape(len(x), -1), *rows).reshape(x.shape)


@_kernel.register
def _add(operation: Add, shapes: tuple[Shape, ...]) -> Kernel:
    return lambda x, y: x + y


@_kernel.register
def _concat(operation: Concat, shapes: tuple[Shape, ...]) -> Kernel:
    return lambda *parts: np.concatenate(parts)


@_kernel.register
def _shuffle(operation: Shuffle, shapes: tuple[Shape, ...]) -> Kernel:
    channels, groups = shapes[0][0], operation.groups
    order = np.arange(channels).reshape(groups, channels // groups).T.reshape(-1)
    return lambda x: x[order]


@_kernel.register
def _argmax(operation: Argmax, shapes: tuple[Shape, ...]) -> Kernel:
    return lambda x: np.asarray(np.argmax(x.reshape(-1)))
