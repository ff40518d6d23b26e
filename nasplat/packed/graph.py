"""What a packed program computes: a list of operations on named values, with no address and no machine in it.

This is what is saved, validated and interpreted. The layout for one processor is made from it (:mod:`.plan`), never
read from a file. A value is a real feature map ``(channels, height, width)`` of one example, or a *pick*, the number of
an expert. Each operation makes one value, and reads values made before it.

Binary operands are bits: 1 is +1 and 0 is -1. Outside its input a binary convolution sees zeros (``padding`` of the
layer that was trained), which no bit can say: such taps count nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nasplat.errors import InvalidInputError

Shape: TypeAlias = tuple[int, int, int]
"""Channels, height and width of a value."""

PICK: Shape = (0, 0, 0)
"""Stands for the shape of a pick."""

INPUT = "input"
"""Name of the value that a program starts from."""

MAX_SIDE = 16_384
"""Greatest height, width, kernel size, stride, dilation or padding."""

MAX_CHANNELS = 1 << 20
"""Greatest number of channels of a value."""

MAX_ELEMENTS = 1 << 28
"""Most numbers in one value or one array: 1 GiB of float32."""

MAX_TOTAL = 1 << 30
"""Most numbers in all values of a program together: 4 GiB of float32 where all are kept."""

MAX_OPERATIONS = 10_000
"""Most operations of a program, and most parts of a concatenation."""

MAX_TAPS = 1 << 14
"""Most taps of a window: 128 by 128."""

MAX_WORK = 1 << 40
"""Most that a program may do for one example: multiply-accumulates, and pixels that pools look at."""

MAX_REDUCTION = 1 << 24
"""Most bits that an output of a binary convolution sums over; up to there float32 holds every integer."""


class Window(NamedTuple):
    """Where a convolution or pool looks.

    Tap ``(i, j)`` of output pixel ``(y, x)`` is the input's pixel
    ``(y * stride + i * dilation - padding[0], x * stride + j * dilation - padding[1])``, which may lie outside.

    Attributes:
        kernel: Height and width, in taps.
        size: Height and width of the output, in pixels.
        stride: In both directions.
        dilation: In both directions.
        padding: Above and to the left. Negative is a crop. What lies below and to the right follows from ``size``.
    """

    kernel: tuple[int, int]
    size: tuple[int, int]
    stride: int = 1
    dilation: int = 1
    padding: tuple[int, int] = (0, 0)

    @property
    def taps(self) -> int:
        """Taps of the kernel, at most :data:`MAX_TAPS`."""
        return prod(self.kernel)


class ArraySpec(NamedTuple):
    """Type and shape that an array of an operation has to have."""

    dtype: Literal["float32", "uint8"]
    shape: tuple[int, ...]


Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class Operation:
    """One operation. Its arrays are fields whose names are in :attr:`ARRAYS`; None where an optional one is absent.

    Attributes:
        name: Of the value that it makes; unique in a program.
    """

    name: str

    KIND: ClassVar[str]
    """Name in a file."""

    ARRAYS: ClassVar[tuple[str, ...]] = ()
    """Names of the arrays, in the order in which a file holds them."""

    OPTIONAL: ClassVar[frozenset[str]] = frozenset()
    """Those that may be absent."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values that it reads."""
        raise NotImplementedError

    def infer(self, shapes: tuple[Shape, ...]) -> Shape:
        """Shape of the value that it makes.

        Args:
            shapes: Of the inputs, in order.

        Raises:
            InvalidInputError: An attribute or an input's shape is not legal.
        """
        raise NotImplementedError

    def specs(self, shapes: tuple[Shape, ...]) -> dict[str, ArraySpec]:
        """What each array has to be, the optional ones included. Called after :meth:`infer` has passed."""
        return {}

    def macs(self, shapes: tuple[Shape, ...]) -> int:
        """Multiply-accumulates of one example; those of a binary convolution are single bits, padding included."""
        return 0

    def work(self, shapes: tuple[Shape, ...]) -> int:
        """What one example takes: :meth:`macs`, or pixels looked at; for a bound, not for a measure."""
        return self.macs(shapes)

    def _check(self, holds: bool, what: str) -> None:
        if not holds:
            raise InvalidInputError(f"operation {self.name!r} ({self.KIND}): {what}")

    def _check_real(self, *shapes: Shape) -> None:
        self._check(PICK not in shapes, "an input is a pick; legal: a feature map")

    def _check_window(self, window: Window) -> None:
        kernel, size, stride, dilation, padding = window
        for name, low, values in (
            ("kernel", 1, kernel),
            ("size", 1, size),
            ("stride", 1, (stride,)),
            ("dilation", 1, (dilation,)),
            ("padding", -MAX_SIDE, padding),
        ):
            self._check(
                all(low <= value <= MAX_SIDE for value in values),
                f"{name} is {values if len(values) > 1 else values[0]}; legal: from {low} to {MAX_SIDE}",
            )
        self._check(window.taps <= MAX_TAPS, f"its kernel has {window.taps} taps; legal: up to {MAX_TAPS}")


@dataclass(frozen=True, eq=False, kw_only=True)
class BinaryConv(Operation):
    """Threshold, binary convolution, scale, optionally a factor per channel and example, optionally a PReLU.

    ``y = conv(x >= threshold ? +1 : -1, bits ? +1 : -1) * scale [* factor]``, an exact integer before the scale, then
    ``y > 0 ? y : slope * y``.

    Attributes:
        x: The input.
        channels: Of the output.
        groups: Of the convolution.
        window: Where it looks.
        experts: Kernels to pick from.
        pick: The value that picks; None with one expert.
        factor: A value ``(channels, 1, 1)`` that multiplies after the scale (squeeze-and-excitation); None without.
        threshold: Per input channel, may be infinite.
        weight: Bits, ``(experts * channels, ceil(taps * in_channels / groups / 8))``, least significant first in
            a byte; the bit of input channel ``c`` of its group at tap ``t`` has index ``t * in_channels / groups + c``.
            The bits after the last are 0.
        scale: Per output channel.
        slope: Per output channel; optional.
    """

    x: str
    channels: int
    groups: int
    window: Window
    experts: int = 1
    pick: str | None = None
    factor: str | None = None
    threshold: Array = field(repr=False)
    weight: Array = field(repr=False)
    scale: Array = field(repr=False)
    slope: Array | None = field(default=None, repr=False)

    KIND = "binary_conv"
    ARRAYS = ("threshold", "weight", "scale", "slope")
    OPTIONAL = frozenset({"slope"})

    @property
    def inputs(self) -> tuple[str, ...]:
        """The feature map, then pick and factor where there are any."""
        return (self.x, *(name for name in (self.pick, self.factor) if name is not None))

    def infer(self, shapes: tuple[Shape, ...]) -> Shape:
        """``(channels, *window.size)``."""
        self._check_real(shapes[0])
        _check_conv(self, shapes[0], self.channels, self.groups, self.window)
        self._check(1 <= self.experts <= MAX_CHANNELS, f"experts is {self.experts}; legal: from 1 up")
        self._check(
            (self.pick is None) == (self.experts == 1), "a pick is needed with more experts than one, and then only"
        )
        if self.pick is not None:
            self._check(shapes[1] == PICK, f"{self.pick!r} is a feature map; legal as pick: the value of an argmax")
        if self.factor is not None:
            wanted = (self.channels, 1, 1)
            self._check(shapes[-1] == wanted, f"the factor has shape {shapes[-1]}; legal: {wanted}")
        reduction = self.reduction(shapes[0][0])
        self._check(reduction <= MAX_REDUCTION, f"it sums over {reduction} bits; legal: up to {MAX_REDUCTION}")
        return self.channels, *self.window.size

    def reduction(self, in_channels: int) -> int:
        """Bits that one output sums over."""
        return self.window.taps * in_channels // self.groups

    def specs(self, shapes: tuple[Shape, ...]) -> dict[str, ArraySpec]:
        """See the class."""
        row = -(-self.reduction(shapes[0][0]) // 8)
        return {
            "threshold": ArraySpec("float32", (shapes[0][0],)),
            "weight": ArraySpec("uint8", (self.experts * self.channels, row)),
            "scale": ArraySpec("float32", (self.channels,)),
            "slope": ArraySpec("float32", (self.channels,)),
        }

    def macs(self, shapes: tuple[Shape, ...]) -> int:
        """Of bits; one expert's."""
        return prod(self.window.size) * self.channels * self.reduction(shapes[0][0])


@dataclass(frozen=True, eq=False, kw_only=True)
class Conv(Operation):
    """Real convolution, then ``y * scale + shift``, then ``y > 0 ? y : slope * y``. Padding is with zeros.

    Attributes:
        x: The input.
        channels: Of the output.
        groups: Of the convolution.
        window: Where it looks.
        weight: ``(channels, in_channels / groups, kernel height, kernel width)``.
        scale: Per output channel; optional.
        shift: Per output channel; optional.
        slope: Per output channel, zeros for a ReLU; optional.
    """

    x: str
    channels: int
    groups: int
    window: Window
    weight: Array = field(repr=False)
    scale: Array | None = field(default=None, repr=False)
    shift: Array | None = field(default=None, repr=False)
    slope: Array | None = field(default=None, repr=False)

    KIND = "conv"
    ARRAYS = ("weight", "scale", "shift", "slope")
    OPTIONAL = frozenset({"scale", "shift", "slope"})

    @property
    def inputs(self) -> tuple[str, ...]:
        """The feature map."""
        return (self.x,)

    def infer(self, shapes: tuple[Shape, ...]) -> Shape:
        """``(channels, *window.size)``."""
        self._check_real(*shapes)
        _check_conv(self, shapes[0], self.channels, self.groups, self.window)
        return self.channels, *self.window.size

    def specs(self, shapes: tuple[Shape, ...]) -> dict[str, ArraySpec]:
        """See the class."""
        row = ArraySpec("float32", (self.channels,))
        weight = ArraySpec("float32", (self.channels, shapes[0][0] // self.groups, *self.window.kernel))
        return {"weight": weight, "scale": row, "shift": row, "slope": row}

    def macs(self, shapes: tuple[Shape, ...]) -> int:
        """Of real numbers."""
        return prod(self.window.size) * self.channels * self.window.taps * shapes[0][0] // self.groups


Activation: TypeAlias = Literal["none", "relu", "sigmoid"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Linear(Operation):
    """``activation(weight @ x + shift)`` of a value ``(in_channels, 1, 1)``.

    Attributes:
        x: The input.
        channels: Of the output.
        activation: What follows.
        weight: ``(channels, in_channels)``.
        shift: Per output channel; optional.
    """

    x: str
    channels: int
    activation: Activation = "none"
    weight: Array = field(repr=False)
    shift: Array | None = field(default=None, repr=False)

    KIND = "linear"
    ARRAYS = ("weight", "shift")
    OPTIONAL = frozenset({"shift"})

    @property
    def inputs(self) -> tuple[str, ...]:
        """The vector."""
        return (self.x,)

    def infer(self, shapes: tuple[Shape, ...]) -> Shape:
        """``(channels, 1, 1)``."""
        self._check_real(*shapes)
        self._check(shapes[0][1:] == (1, 1), f"its input has shape {shapes[0]}; legal: (channels, 1, 1)")
        self._check(1 <= self.channels <= MAX_CHANNELS, f"channels is {self.channels}; legal: from 1 to {MAX_CHANNELS}")
        self._check(
            self.activation in ("none", "relu", "sigmoid"),
            f"activation is {self.activation!r}; legal: 'none', 'relu', 'sigmoid'",
        )
        return self.channels, 1, 1

    def specs(self, shapes: tuple[Shape, ...]) -> dict[str, ArraySpec]:
        """See the class."""
        return {
            "weight": ArraySpec("float32", (self.channels, shapes[0][0])),
            "shift": ArraySpec("float32", (self.channels,)),
        }

    def macs(self, shapes: tuple[Shape, ...]) -> int:
        """Of real numbers."""
        return self.channels * shapes[0][0]


@dataclass(frozen=True, eq=False, kw_only=True)
class Pool(Operation):
    """Maximum or average over a window. What lies outside the input is left out.

    Attributes:
        x: The input.
        mode: Which.
        window: Where it looks; dilation 1. Each window has at least one pixel inside.
        count_padding: Whether an average divides by all taps of the kernel instead of by those inside.
    """

    x: str
    mode: Literal["max", "average"]
    window: Window
    count_padding: bool = False

    KIND = "pool"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The feature map."""
        return (self.x,)

    def infer(self, shapes: tuple[Shape, ...]) -> Shape:
        """``(channels, *window.size)``."""
        self._check_real(*shapes)
        self._check_window(self.window)
        self._check(self.mode in ("max", "average"), f"mode is {self.mode!r}; legal: 'max', 'average'")
        self._check(self.window.dilation == 1, f"dilation is {self.window.dilation}; legal: 1")
        self._check(not (self.count_padding and self.mode == "max"), "count_padding belongs to an average")
        for side, out, kernel, padding in zip(
            shapes[0][1:], self.window.size, self.window.kernel, self.window.padding, strict=True
        ):
            last = (out - 1) * self.window.stride - padding
            self._check(
                0 <= padding < kernel and last < side,
                f"a window lies outside the {side} pixels: kernel {kernel}, padding {padding}, {out} outputs",
            )
        return _checked(self, (shapes[0][0], *self.window.size))

    def work(self, shapes: tuple[Shape, ...]) -> int:
        """Pixels looked at."""
        return shapes[0][0] * prod(self.window.size) * self.window.taps


@dataclass(frozen=True, eq=False, kw_only=True)
class Mean(Operation):
    """Mean over height and width.

    Attributes:
        x: The input.
    """

    x: str

    KIND = "mean"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The feature map."""
        return (self.x,)

    def infer(self, shapes: tuple[Shape, ...]) -> Shape:
        """``(channels, 1, 1)``."""
        self._check_real(*shapes)
        return shapes[0][0], 1, 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Affine(Operation):
    """``y = x * scale + shift``, then ``y > 0 ? y : slope * y``: a normalisation or an activation by itself.

    Attributes:
        x: The input.
        scale: Per channel; optional.
        shift: Per channel; optional.
        slope: Per channel, zeros for a ReLU; optional.
    """

    x: str
    scale: Array | None = field(default=None, repr=False)
    shift: Array | None = field(default=None, repr=False)
    slope: Array | None = field(default=None, repr=False)

    KIND = "affine"
    ARRAYS = ("scale", "shift", "slope")
    OPTIONAL = frozenset({"scale", "shift", "slope"})

    @property
    def inputs(self) -> tuple[str, ...]:
        """The feature map."""
        return (self.x,)

    def infer(self, shapes: tuple[Shape, ...]) -> Shape:
        """That of the input."""
        self._check_real(*shapes)
        return shapes[0]

    def specs(self, shapes: tuple[Shape, ...]) -> dict[str, ArraySpec]:
        """See the class."""
        return dict.fromkeys(self.ARRAYS, ArraySpec("float32", (shapes[0][0],)))


@dataclass(frozen=True, eq=False, kw_only=True)
class Add(Operation):
    """Sum of two values of one shape.

    Attributes:
        x: One.
        y: The other.
    """

    x: str
    y: str

    KIND = "add"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Both."""
        return self.x, self.y

    def infer(self, shapes: tuple[Shape, ...]) -> Shape:
        """That of both."""
        self._check_real(*shapes)
        self._check(shapes[0] == shapes[1], f"its inputs have shapes {shapes[0]} and {shapes[1]}; legal: equal ones")
        return shapes[0]


@dataclass(frozen=True, eq=False, kw_only=True)
class Concat(Operation):
    """Values of one height and width, their channels one after the other.

    Attributes:
        parts: One or more values.
    """

    parts: tuple[str, ...]

    KIND = "concat"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The parts."""
        return self.parts

    def infer(self, shapes: tuple[Shape, ...]) -> Shape:
        """The sum of the channels, and the common height and width."""
        self._check(0 < len(shapes) <= MAX_OPERATIONS, f"it has {len(shapes)} parts; legal: 1 to {MAX_OPERATIONS}")
        self._check_real(*shapes)
        sizes = {shape[1:] for shape in shapes}
        self._check(len(sizes) == 1, f"its parts have heights and widths {sorted(sizes)}; legal: equal ones")
        return _checked(self, (sum(shape[0] for shape in shapes), *shapes[0][1:]))


@dataclass(frozen=True, eq=False, kw_only=True)
class Shuffle(Operation):
    """Channel shuffle: channel ``g * n + i`` of ``groups * n`` goes to ``i * groups + g`` (``nn.ChannelShuffle``).

    Attributes:
        x: The input.
        groups: A divisor of its channels.
    """

    x: str
    groups: int

    KIND = "shuffle"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The feature map."""
        return (self.x,)

    def infer(self, shapes: tuple[Shape, ...]) -> Shape:
        """That of the input."""
        self._check_real(*shapes)
        _check_groups(self, self.groups, shapes[0][0])
        return shapes[0]


@dataclass(frozen=True, eq=False, kw_only=True)
class Argmax(Operation):
    """Number of the largest channel of a value ``(n, 1, 1)``, the first of equal ones.

    Attributes:
        x: The input.
    """

    x: str

    KIND = "argmax"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The vector."""
        return (self.x,)

    def infer(self, shapes: tuple[Shape, ...]) -> Shape:
        """:data:`PICK`."""
        self._check_real(*shapes)
        self._check(shapes[0][1:] == (1, 1), f"its input has shape {shapes[0]}; legal: (channels, 1, 1)")
        return PICK


KINDS: Mapping[str, type[Operation]] = {
    kind.KIND: kind for kind in (BinaryConv, Conv, Linear, Pool, Mean, Affine, Add, Concat, Shuffle, Argmax)
}
"""Every kind of operation by its name in a file."""


def _check_groups(operation: Operation, groups: int, *channels: int) -> None:
    operation._check(
        groups >= 1 and all(count % groups == 0 for count in channels),
        f"groups is {groups}; legal: a divisor of the channels {' and '.join(map(str, channels))}",
    )


def _check_conv(operation: Operation, shape: Shape, channels: int, groups: int, window: Window) -> None:
    operation._check(1 <= channels <= MAX_CHANNELS, f"channels is {channels}; legal: from 1 to {MAX_CHANNELS}")
    _check_groups(operation, groups, shape[0], channels)
    operation._check_window(window)
    _checked(operation, (channels, *window.size))


def _checked(operation: Operation, shape: Shape) -> Shape:
    operation._check(
        shape[0] <= MAX_CHANNELS and max(shape[1:]) <= MAX_SIDE and prod(shape) <= MAX_ELEMENTS,
        f"its value would have shape {shape}; legal: up to {MAX_CHANNELS} channels, sides of {MAX_SIDE}, "
        f"{MAX_ELEMENTS} numbers in all",
    )
    return shape


class Program(NamedTuple):
    """Operations in order, and the shapes around them.

    Attributes:
        input_shape: Of one example.
        operations: In an order in which each reads values made before it.
        output: Name of the value that is the result.
        flat: Whether the result ``(channels, 1, 1)`` is handed out as ``(channels,)``: logits.
    """

    input_shape: Shape
    operations: tuple[Operation, ...]
    output: str
    flat: bool = True


def check_step(operation: Operation, shapes: Mapping[str, Shape]) -> Shape:
    """Check one operation but for its arrays.

    Args:
        operation: The next one.
        shapes: Of all values made before it, by name.

    Returns:
        Shape of the value that it makes.

    Raises:
        InvalidInputError: Something is not legal; the message names the operation.
    """
    missing = [name for name in operation.inputs if name not in shapes]
    operation._check(not missing, f"it reads {missing}, which nothing before it makes")
    operation._check(
        bool(operation.name) and operation.name not in shapes, "its name is empty, or that of an earlier value"
    )
    return operation.infer(tuple(shapes[name] for name in operation.inputs))


def check_arrays(operation: Operation, shapes: Mapping[str, Shape]) -> None:
    """Check the arrays of an operation that :func:`check_step` has passed.

    Raises:
        InvalidInputError: One is missing, has another type or shape than it must, or holds what it must not.
    """
    specs = operation.specs(tuple(shapes[name] for name in operation.inputs))
    for name, spec in specs.items():
        array = getattr(operation, name)
        if array is None:
            operation._check(name in operation.OPTIONAL, f"its {name} is missing")
            continue
        operation._check(
            isinstance(array, np.ndarray) and array.dtype == spec.dtype and array.shape == spec.shape,
            f"its {name} has type {getattr(array, 'dtype', type(array).__name__)} and shape "
            f"{getattr(array, 'shape', None)}; legal: {spec.dtype} {spec.shape}",
        )
        if spec.dtype == "float32":
            legal = ~np.isnan(array) if name == "threshold" else np.isfinite(array)
            operation._check(bool(legal.all()), f"its {name} holds a number that is not finite")
    if isinstance(operation, BinaryConv):
        last = operation.reduction(shapes[operation.x][0]) % 8
        operation._check(
            last == 0 or not (operation.weight[:, -1] >> last).any(), "its weight has ones after a row's last bit"
        )


def check_program(program: Program) -> dict[str, Shape]:
    """Check a whole program.

    Returns:
        Shape of each value by name, the input's first.

    Raises:
        InvalidInputError: Something is not legal; the message names the operation.
    """
    check_count(len(program.operations))
    shapes = check_input(program.input_shape)
    for operation in program.operations:
        shapes[operation.name] = check_step(operation, shapes)
        check_arrays(operation, shapes)
    check_output(program.output, program.flat, shapes)
    check_picks(program.operations, shapes)
    check_total(program.operations, shapes)
    return shapes


def check_count(operations: int) -> None:
    """Check the number of operations.

    Raises:
        InvalidInputError: There are too many.
    """
    if operations > MAX_OPERATIONS:
        raise InvalidInputError(f"the program has {operations} operations; legal: up to {MAX_OPERATIONS}")


def check_picks(operations: Iterable[Operation], shapes: Mapping[str, Shape]) -> None:
    """Check that each pick is among as many as the convolution has experts.

    Raises:
        InvalidInputError: One is among more or fewer.
    """
    choices: dict[str, int] = {}
    for operation in operations:
        if isinstance(operation, Argmax):
            choices[operation.name] = shapes[operation.x][0]
        elif isinstance(operation, BinaryConv) and operation.pick is not None:
            count = choices[operation.pick]
            operation._check(
                count == operation.experts,
                f"{operation.pick!r} picks from {count}; legal: its {operation.experts} experts",
            )


def check_total(operations: Iterable[Operation], shapes: Mapping[str, Shape]) -> None:
    """Check the size of all values together, and all that is to be done.

    Raises:
        InvalidInputError: They are too large, or it is too much.
    """
    work = sum(operation.work(tuple(shapes[name] for name in operation.inputs)) for operation in operations)
    if work > MAX_WORK:
        raise InvalidInputError(f"the program does {work} operations for one example; legal: up to {MAX_WORK}")
    total = sum(map(prod, shapes.values()))
    if total > MAX_TOTAL:
        raise InvalidInputError(f"the values of the program have {total} numbers in all; legal: up to {MAX_TOTAL}")


def check_input(shape: Shape) -> dict[str, Shape]:
    """The shapes before the first operation.

    Raises:
        InvalidInputError: The input's shape is not legal.
    """
    channels, *sides = shape
    if not (1 <= channels <= MAX_CHANNELS and all(1 <= side <= MAX_SIDE for side in sides)) or (
        prod(shape) > MAX_ELEMENTS
    ):
        raise InvalidInputError(
            f"the input has shape {shape}; legal: 1 to {MAX_CHANNELS} channels, sides from 1 to {MAX_SIDE}, "
            f"{MAX_ELEMENTS} numbers in all"
        )
    return {INPUT: shape}


def check_output(output: str, flat: bool, shapes: Mapping[str, Shape]) -> None:
    """Check the result.

    Raises:
        InvalidInputError: Nothing makes it, it is a pick, or it is flat and has height and width.
    """
    shape = shapes.get(output)
    if shape is None or shape == PICK:
        raise InvalidInputError(f"the output {output!r} is no feature map of the program")
    if flat and shape[1:] != (1, 1):
        raise InvalidInputError(f"the output has shape {shape}; legal where it is flat: (channels, 1, 1)")


def array_fields(operation: Operation) -> dict[str, Array | None]:
    """The arrays of an operation by name, in the order of a file."""
    return {name: getattr(operation, name) for name in operation.ARRAYS}


def attributes(operation: Operation) -> dict[str, Any]:
    """All that is not an array, by name, in the order of the class."""
    return {item.name: getattr(operation, item.name) for item in fields(operation) if item.name not in operation.ARRAYS}
