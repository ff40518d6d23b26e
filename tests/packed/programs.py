"""Random legal programs: of one operation, and small graphs as networks have them, with arrays at every edge of legal.

Everything is drawn from one NumPy generator, so that a failing case is told by its seed::

    rng = np.random.default_rng(seed)
    program = graph(rng)
    x = images(rng, program.input_shape, n=2)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from nasplat.packed.graph import (
    INPUT,
    KINDS,
    PICK,
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
    check_step,
)

T = TypeVar("T")

GROUP_SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 16, 24, 31, 32, 33, 48, 63, 64, 65)
"""Channels of a group: around the sizes of nibbles, bytes and words."""

seeds = st.integers(0, 2**32 - 1)
"""Hypothesis: of a generator, ``np.random.default_rng(seed)``."""


def choose(rng: np.random.Generator, *options: T) -> T:
    """One of the options."""
    return options[int(rng.integers(len(options)))]


def reals(rng: np.random.Generator, *shape: int, zeros: float = 0.1, size: float = 1.0) -> NDArray[np.float32]:
    """Normal numbers of both signs, some of them 0, -0 or 1."""
    values = (rng.standard_normal(shape) * size).astype(np.float32)
    special = rng.choice(np.float32([0.0, -0.0, 1.0]), shape)
    return np.where(rng.random(shape) < zeros, special, values).astype(np.float32)


def images(rng: np.random.Generator, shape: Shape, n: int) -> NDArray[np.float32]:
    """A batch. Half of the numbers are multiples of a half, so that they meet thresholds and each other exactly."""
    x = rng.standard_normal((n, *shape)).astype(np.float32)
    return np.where(rng.random(x.shape) < 0.5, np.round(x * 2) / 2, x).astype(np.float32)


def thresholds(rng: np.random.Generator, channels: int) -> NDArray[np.float32]:
    """Some are infinite, many are a value that :func:`images` has."""
    values = images(rng, (channels, 1, 1), 1).reshape(-1)
    special = rng.choice(np.float32([np.inf, -np.inf, 0.0, -0.0]), channels)
    return np.where(rng.random(channels) < 0.2, special, values).astype(np.float32)


def bits(rng: np.random.Generator, rows: int, reduction: int) -> NDArray[np.uint8]:
    """Rows of random bits as a :class:`BinaryConv` holds them."""
    return np.packbits(rng.integers(0, 2, (rows, reduction), dtype=np.uint8), axis=1, bitorder="little")


def optional(rng: np.random.Generator, make: Callable[..., T], *arguments: Any) -> T | None:
    """What ``make`` makes, or None."""
    return make(*arguments) if rng.random() < 0.5 else None


def window(
    rng: np.random.Generator, sides: tuple[int, int], *, keep: bool = False, dilation: bool = True, kernel: int = 5
) -> Window:
    """A window of a convolution.

    Args:
        rng: Generator.
        sides: Height and width of the input.
        keep: Whether the output has the input's.
        dilation: Whether there may be one above 1.
        kernel: Greatest side of the kernel.
    """
    shape = (int(rng.integers(1, kernel + 1)), int(rng.integers(1, kernel + 1)))
    dilated = choose(rng, 1, 1, 2, 3) if dilation else 1
    if keep:
        return Window(shape, sides, 1, dilated, tuple((k - 1) * dilated // 2 for k in shape))
    stride = choose(rng, 1, 1, 2, 3)
    low, high = choose(rng, (0, 0), (0, 4), (-2, 2))
    before, after = rng.integers(low, high + 1, 2).tolist(), rng.integers(low, high + 1, 2).tolist()
    size = tuple(
        max(1, (side + a + b - dilated * (k - 1) - 1) // stride + 1)
        for side, k, a, b in zip(sides, shape, before, after, strict=True)
    )
    return Window(shape, size, stride, dilated, tuple(before))


class Build:
    """Appends operations with random arrays. Each method returns the name of the new value.

    Attributes:
        rng: Where all is drawn from.
        shapes: Of the values so far, by name.
        operations: So far.
    """

    def __init__(self, rng: np.random.Generator, input_shape: Shape) -> None:
        self.rng = rng
        self.shapes: dict[str, Shape] = {INPUT: input_shape}
        self.operations: list[Operation] = []

    def append(self, operation: Operation) -> str:
        self.shapes[operation.name] = check_step(operation, self.shapes)
        self.operations.append(operation)
        return operation.name

    def program(self, output: str | None = None) -> Program:
        """All of it, with the last value as the output where none is named."""
        output = output or self.operations[-1].name
        flat = self.shapes[output][1:] == (1, 1) and bool(self.rng.integers(2))
        program = Program(self.shapes[INPUT], tuple(self.operations), output, flat)
        check_program(program)
        return program

    def name(self, kind: str) -> str:
        number = len(self.operations)
        return f"stages.{number % 3}.cells.{number % 2}.edges.{number}.{kind}"

    def groups(self, channels: int) -> int:
        """A divisor."""
        return choose(self.rng, *(g for g in range(1, channels + 1) if channels % g == 0))

    def binary_conv(
        self,
        x: str,
        groups: int | None = None,
        channels: int | None = None,
        window_: Window | None = None,
        pick: str | None = None,
        experts: int = 1,
        factor: str | None = None,
    ) -> str:
        rng, in_channels = self.rng, self.shapes[x][0]
        if groups is None:
            groups = self.groups(in_channels)
        if factor is not None:
            channels = self.shapes[factor][0]
            groups = np.gcd(groups, channels).item()
        if channels is None:
            channels = groups * choose(rng, 1, 2, 3, 5, in_channels // groups)
        window_ = window_ or window(rng, self.shapes[x][1:])
        reduction = window_.taps * in_channels // groups
        operation = BinaryConv(
            name=self.name("conv"),
            x=x,
            channels=channels,
            groups=groups,
            window=window_,
            experts=experts,
            pick=pick,
            factor=factor,
            threshold=thresholds(rng, in_channels),
            weight=bits(rng, experts * channels, reduction),
            scale=reals(rng, channels, size=reduction**-0.5),
            slope=optional(rng, reals, rng, channels),
        )
        return self.append(operation)

    def conv(
        self, x: str, groups: int | None = None, channels: int | None = None, window_: Window | None = None
    ) -> str:
        rng, in_channels = self.rng, self.shapes[x][0]
        groups = groups or self.groups(in_channels)
        channels = channels or groups * choose(rng, 1, 2, 3)
        window_ = window_ or window(rng, self.shapes[x][1:])
        row = in_channels // groups
        operation = Conv(
            name=self.name("real"),
            x=x,
            channels=channels,
            groups=groups,
            window=window_,
            weight=reals(rng, channels, row, *window_.kernel, size=(row * window_.taps) ** -0.5),
            scale=optional(rng, reals, rng, channels),
            shift=optional(rng, reals, rng, channels),
            slope=optional(rng, reals, rng, channels),
        )
        return self.append(operation)

    def linear(self, x: str, channels: int | None = None, activation: str | None = None) -> str:
        rng, in_channels = self.rng, self.shapes[x][0]
        channels = channels or choose(rng, 1, 2, 5, 10, 17)
        operation = Linear(
            name=self.name("linear"),
            x=x,
            channels=channels,
            activation=activation or choose(rng, "none", "relu", "sigmoid"),  # type: ignore[arg-type]
            weight=reals(rng, channels, in_channels, size=in_channels**-0.5),
            shift=optional(rng, reals, rng, channels),
        )
        return self.append(operation)

    def pool(self, x: str) -> str:
        rng, sides = self.rng, self.shapes[x][1:]
        kernel = (int(rng.integers(1, 6)), int(rng.integers(1, 6)))
        stride = choose(rng, 1, 2, 3)
        padding = tuple(int(rng.integers(0, k)) for k in kernel)
        # Up to the last window that has a pixel inside, which is more than without `ceil_mode`.
        most = tuple((side - 1 + p) // stride + 1 for side, p in zip(sides, padding, strict=True))
        size = tuple(choose(rng, m, max(1, m - 1)) for m in most)
        mode = choose(rng, "max", "average")
        count_padding = mode == "average" and bool(rng.integers(2))
        window_ = Window(kernel, size, stride, 1, padding)
        return self.append(
            Pool(name=self.name("pool"), x=x, mode=mode, window=window_, count_padding=count_padding)  # type: ignore[arg-type]
        )

    def mean(self, x: str) -> str:
        return self.append(Mean(name=self.name("mean"), x=x))

    def affine(self, x: str) -> str:
        rng, channels = self.rng, self.shapes[x][0]
        rows = {name: optional(rng, reals, rng, channels) for name in Affine.ARRAYS}
        return self.append(Affine(name=self.name("affine"), x=x, **rows))

    def add(self, x: str, y: str) -> str:
        return self.append(Add(name=self.name("add"), x=x, y=y))

    def concat(self, *parts: str) -> str:
        return self.append(Concat(name=self.name("concat"), parts=parts))

    def shuffle(self, x: str, groups: int | None = None) -> str:
        return self.append(Shuffle(name=self.name("shuffle"), x=x, groups=groups or self.groups(self.shapes[x][0])))

    def argmax(self, x: str) -> str:
        return self.append(Argmax(name=self.name("argmax"), x=x))

    def pick(self, x: str, experts: int) -> str:
        """The gate of an expert convolution."""
        return self.argmax(self.linear(self.mean(x), experts, "none"))

    def experts_conv(self, x: str, experts: int = 3, **options: Any) -> str:
        """A convolution of experts and its gate."""
        return self.binary_conv(x, pick=self.pick(x, experts), experts=experts, **options)

    def squeeze(self, x: str, channels: int) -> str:
        """The factor of a squeeze-and-excitation of ``channels`` from the mean of ``x``."""
        return self.linear(self.linear(self.mean(x), max(1, channels // 4), "relu"), channels, "sigmoid")


def shape(rng: np.random.Generator, groups: int | None = None) -> tuple[Shape, int]:
    """A shape of a value and a divisor of its channels: few groups of many channels, or many of few."""
    size = choose(rng, *GROUP_SIZES)
    if groups is None:
        groups = choose(rng, *(g for g in (1, 2, 3, 4, 12) if g * size <= 144))
    return (groups * size, int(rng.integers(1, 13)), int(rng.integers(1, 13))), groups


def binary_conv(rng: np.random.Generator) -> Program:
    """One binary convolution, plain, or with a factor or experts and what they come from."""
    input_shape, groups = shape(rng)
    build = Build(rng, input_shape)
    channels = groups * choose(rng, 1, 2, 3, 7, 8, 16, 17)
    factor = optional(rng, build.squeeze, INPUT, channels)
    options = {"groups": groups, "factor": factor, "channels": channels}
    if rng.random() < 0.3:
        build.experts_conv(INPUT, choose(rng, 2, 3, 5), **options)
    else:
        build.binary_conv(INPUT, **options)
    return build.program()


def single(rng: np.random.Generator, kind: str) -> Program:
    """A program of one operation of this kind, with others where it needs any (an argmax is read by experts)."""
    if kind == "binary_conv":
        return binary_conv(rng)
    input_shape, groups = shape(rng)
    if kind in ("linear", "argmax"):
        input_shape = (input_shape[0], 1, 1)
    build = Build(rng, input_shape)
    if kind == "argmax":
        experts = input_shape[0]
        pick = build.argmax(INPUT) if experts > 1 else build.pick(INPUT, 2)
        build.binary_conv(INPUT, channels=groups, groups=groups, pick=pick, experts=max(2, experts))
    elif kind == "add":
        build.add(INPUT, choose(rng, INPUT, build.affine(INPUT)))
    elif kind == "concat":
        build.concat(*(choose(rng, INPUT, build.affine(INPUT)) for _ in range(rng.integers(1, 5))))
    elif kind == "shuffle":
        build.shuffle(INPUT, groups)
    elif kind == "conv":
        build.conv(INPUT, groups)
    else:
        getattr(build, kind)(INPUT)
    return build.program()


def graph(rng: np.random.Generator, blocks: int = 6, limit: int = 64) -> Program:
    """A small graph of the patterns of binary networks.

    A residual sum, a sum over several branches, a concatenation of what several branches made, a shuffle after a
    convolution, experts with their gate, a squeezed factor, pools, real ends. Values are used again later, and the
    output may be any of them.

    Args:
        rng: Generator.
        blocks: Patterns.
        limit: Most channels of a value; there are a few more in a concatenation.
    """
    input_shape = (choose(rng, 1, 2, 3, 8, 12, 36), int(rng.integers(1, 11)), int(rng.integers(1, 11)))
    build = Build(rng, input_shape)
    live = [INPUT]
    if rng.random() < 0.7:
        live.append(build.conv(INPUT, 1, choose(rng, 3, 8, 12, 24, 33)))

    def same(x: str) -> str:
        """A branch that keeps the shape."""
        channels, *sides = build.shapes[x]
        kind = rng.random()
        if kind < 0.15:
            return build.affine(x)
        if kind < 0.3:
            return x
        kept = window(rng, (sides[0], sides[1]), keep=True, kernel=3)
        factor = build.squeeze(x, channels) if rng.random() < 0.2 else None
        options: dict[str, Any] = {"window_": kept, "channels": channels, "factor": factor}
        y = build.experts_conv(x, **options) if rng.random() < 0.2 else build.binary_conv(x, **options)
        return build.shuffle(y) if rng.random() < 0.5 else y

    def branches(x: str) -> list[str]:
        return [same(x) for _ in range(rng.integers(2, 5))]

    for _ in range(blocks):
        x = choose(rng, *live, live[-1], live[-1])
        narrow = build.shapes[x][0] <= limit
        pattern = choose(rng, "residual", "sum", "concat", "change", "pool", "reduce", "vector")
        if pattern == "residual":
            y = build.add(*choose(rng, (x, same(x)), (same(x), x)))
        elif pattern == "sum":
            y, *others = branches(x)
            for other in others:
                y = build.add(*choose(rng, (y, other), (other, y)))
        elif pattern == "concat" and narrow:
            y = build.concat(*branches(x)[:3])
        elif pattern == "pool":
            y = build.pool(x)
        elif pattern == "reduce" and narrow:
            # Two halves of the new channels, the second from an image that is shifted by one pixel.
            channels, height, width = build.shapes[x]
            size = (-(-height // 2), -(-width // 2))
            views = [Window((1, 1), size, 2, 1, (-shift, -shift)) for shift in (0, 1)]
            y = build.concat(*(build.binary_conv(x, 1, channels, view) for view in views))
        elif pattern == "vector" and rng.random() < 0.5:
            y = build.linear(build.mean(x))
        else:
            groups = build.groups(build.shapes[x][0])
            channels = groups * max(1, choose(rng, 4, 12, 33, limit) // groups)
            y = build.binary_conv(x, groups, channels) if rng.random() < 0.8 else build.conv(x)
        live.append(y)
    if rng.random() < 0.4:
        live.append(build.linear(build.mean(live[-1]), 10, "none"))
    values = [name for name, size in build.shapes.items() if size != PICK]
    return build.program(live[-1] if rng.random() < 0.7 else choose(rng, *values))


def small(rng: np.random.Generator) -> Program:
    """A graph of at most a few thousand numbers."""
    while True:
        program = graph(rng, blocks=2, limit=12)
        if sum(np.prod(size) for size in check_program(program).values()) < 5_000:
            return program


programs = st.one_of(
    seeds.map(lambda seed: graph(np.random.default_rng(seed))),
    *(st.builds(single, seeds.map(np.random.default_rng), st.just(kind)) for kind in KINDS),
)
"""Hypothesis: legal programs of one operation, and of several."""
