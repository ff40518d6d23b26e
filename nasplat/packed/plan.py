"""From a checked program to a table for the executor: what is fused, where everything lies, what is computed when.

Fused are a shuffle and up to two sums into the operation that makes the value (the results are the same bit for bit: a
sum of two floats does not depend on their order). A value that is only a part of a concatenation is written in its
place there. Several convolutions that read the same bits share them.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nasplat.errors import InvalidInputError
from nasplat.packed import layout
from nasplat.packed.engine import Step
from nasplat.packed.geometry import Planes, plane_layout
from nasplat.packed.graph import (
    INPUT,
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
)
from nasplat.packed.kernels import fields as f
from nasplat.packed.kernels.emit import CODE_BYTES, Kind
from nasplat.packed.kernels.isa import Isa

MAX_BYTES = 1 << 32
"""Most memory that a program may take for one example, in bytes."""

_ALIGNMENT = 64

_SLACK = 4096
"""Bytes behind constants and arena that vectors may read."""

_PACKED_SLACK = 256
"""Bytes behind a packed input that the packer may write."""

_SUMS_BYTES = 16_384
"""Size of the sums that a strip of rows may have: half of a usual first-level cache."""


class Place(NamedTuple):
    """Where a value lies.

    Attributes:
        at: Offset in the arena, in bytes.
        shape: Of the value.
    """

    at: int
    shape: Shape


class Plan(NamedTuple):
    """All that the executor needs.

    Attributes:
        table: ``(rows, columns)``, int64; see :mod:`nasplat.packed.kernels.fields`.
        consts: Bytes of weights and tables.
        arena_bytes: Memory for one example.
        values: Where each value lies while it is needed, by name.
        steps: Per row, what it computes.
    """

    table: NDArray[np.int64]
    consts: NDArray[np.uint8]
    arena_bytes: int
    values: dict[str, Place]
    steps: tuple[Step, ...]


@dataclass
class _Node:
    """One row of the table (beside the packing before it): an operation and what is fused into it."""

    operation: Operation
    out: str
    residuals: list[str] = field(default_factory=list)
    shuffle: int = 1
    fused: list[str] = field(default_factory=list)

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*self.operation.inputs, *self.residuals)


_Permuting = (BinaryConv, Conv, Affine)
_Summing = (BinaryConv, Conv, Affine, Pool)


def _fuse(program: Program, shapes: dict[str, Shape]) -> tuple[list[_Node], dict[str, tuple[str, int]]]:
    """The rows, and which values are parts of which concatenation, from which channel on."""
    uses: dict[str, int] = {program.output: 1}
    for operation in program.operations:
        for name in operation.inputs:
            uses[name] = uses.get(name, 0) + 1
    nodes: list[_Node] = []
    makers: dict[str, int] = {}
    # Row after which a value is there: of its maker, or of the last part of a concatenation.
    ready: dict[str, int] = {}
    parts: dict[str, tuple[str, int]] = {}
    whole: set[str] = set()
    taken = {INPUT, *(operation.name for operation in program.operations)}

    def add(node: _Node) -> None:
        makers[node.out] = ready[node.out] = len(nodes)
        nodes.append(node)

    def into(name: str, kinds: tuple[type[Operation], ...]) -> int | None:
        """The row that makes a value that nothing else reads, and that more can be fused into."""
        index = makers.get(name)
        if index is None or uses[name] > 1 or not isinstance(nodes[index].operation, kinds):
            return None
        return index

    for operation in program.operations:
        index: int | None = None
        if isinstance(operation, Shuffle):
            index = into(operation.x, _Permuting)
            if index is not None and (nodes[index].residuals or nodes[index].shuffle > 1):
                index = None
            if index is not None:
                nodes[index].shuffle = operation.groups
        elif isinstance(operation, Add):
            # The later row: when it runs, the other term is there.
            last = max((operation.x, operation.y), key=lambda name: ready.get(name, -1))
            index = into(last, _Summing)
            if index is not None and len(nodes[index].residuals) < 2:
                nodes[index].residuals.append(operation.y if last == operation.x else operation.x)
            else:
                index = None
        elif isinstance(operation, Concat):
            channel = 0
            for number, part in enumerate(operation.parts):
                if part in makers and part not in parts and part not in whole:
                    parts[part] = operation.name, channel
                else:
                    copy = _unused(f"{operation.name}[{number}]", taken)
                    shapes[copy] = shapes[part]
                    add(_Node(Affine(name=copy, x=part), copy, fused=[]))
                    parts[copy] = operation.name, channel
                channel += shapes[part][0]
            whole.add(operation.name)
            ready[operation.name] = len(nodes) - 1
            continue
        if index is not None:
            node = nodes[index]
            node.out = operation.name
            node.fused.append(operation.name)
            makers[operation.name] = ready[operation.name] = index
        elif isinstance(operation, Shuffle):
            plain = Affine(name=operation.name, x=operation.x)
            add(_Node(plain, operation.name, shuffle=operation.groups, fused=[operation.name]))
        elif isinstance(operation, Add):
            plain = Affine(name=operation.name, x=operation.x)
            add(_Node(plain, operation.name, residuals=[operation.y], fused=[operation.name]))
        else:
            add(_Node(operation, operation.name, fused=[operation.name]))
    return nodes, parts


def _unused(name: str, taken: Container[str]) -> str:
    """A name that no value has: ``name`` itself, but a file may have chosen that."""
    while name in taken:
        name += "'"
    return name


class _Constants:
    """Arrays one behind the other, equal ones once."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._known: dict[bytes, int] = {}
        self._size = 0

    def add(self, array: NDArray[Any]) -> int:
        """Offset of an array's bytes."""
        content = np.ascontiguousarray(array).tobytes()
        if content not in self._known:
            self._known[content] = self._size
            self._parts.append(content + bytes(-len(content) % _ALIGNMENT))
            self._size += len(self._parts[-1])
        return self._known[content]

    def row(self, values: NDArray[np.float32] | None, channels: int, otherwise: float) -> int:
        """Offset of one float per channel."""
        return self.add(np.full(channels, otherwise, np.float32) if values is None else values)

    def finish(self) -> NDArray[np.uint8]:
        return np.frombuffer(b"".join(self._parts) + bytes(_SLACK), np.uint8)


class _Buffer(NamedTuple):
    size: int
    first: int
    last: int


class _Buffers:
    """Which memory is needed from which row to which, and then where it lies."""

    def __init__(self) -> None:
        self._buffers: dict[str, _Buffer] = {}

    def need(self, name: str, size: int, row: int) -> None:
        """A buffer of a name is used in a row."""
        if size > MAX_BYTES:
            raise InvalidInputError(f"{name!r} takes {size} bytes for one example; legal: up to {MAX_BYTES}")
        had = self._buffers.get(name, _Buffer(0, row, row))
        self._buffers[name] = _Buffer(max(size, had.size), min(row, had.first), max(row, had.last))

    def place(self) -> tuple[dict[str, int], int]:
        """Offset of each, the largest and then the first first, each as low as it fits, and the size of the whole."""
        ordered = sorted(self._buffers.items(), key=lambda item: (-item[1].size, item[1].first, item[0]))
        sizes, firsts, lasts = np.array([buffer for _, buffer in ordered], np.int64).reshape(-1, 3).T
        starts = np.zeros_like(sizes)
        end = 0
        for number, (_, buffer) in enumerate(ordered):
            at = 0
            # Those placed before it that are needed at the same time.
            others = np.flatnonzero((lasts[:number] >= buffer.first) & (firsts[:number] <= buffer.last))
            for other in others[np.argsort(starts[others], kind="stable")]:
                if at + buffer.size <= starts[other]:
                    break
                at = max(at, int(starts[other] + sizes[other]))
                at += -at % _ALIGNMENT
            starts[number] = at
            end = max(end, at + buffer.size)
        offsets = {name: int(start) for (name, _), start in zip(ordered, starts, strict=True)}
        if end > MAX_BYTES:
            raise InvalidInputError(f"the program takes {end} bytes for one example; legal: up to {MAX_BYTES}")
        return offsets, end + _SLACK


class _Packed(NamedTuple):
    """A packed input that some convolutions share."""

    name: str
    kind: Kind
    planes: Planes
    windows: tuple[Window, ...]

    @property
    def plane_bytes(self) -> int:
        return self.planes.codes * CODE_BYTES[self.kind]


def make_plan(program: Program, isa: Isa) -> Plan:
    """Lay a program out for one instruction set.

    Args:
        program: Any.
        isa: What the executor was compiled for.

    Raises:
        InvalidInputError: The program is not legal, or takes too much memory.
    """
    return _Planner(program, isa).plan()


class _Planner:
    def __init__(self, program: Program, isa: Isa) -> None:
        self.program = program
        self.isa = isa
        self.shapes = check_program(program)
        self.names = set(self.shapes)
        self.nodes, self.parts = _fuse(program, self.shapes)
        self.consts = _Constants()
        self.buffers = _Buffers()
        self.rows: list[dict[int, int]] = []
        self.steps: list[Step] = []
        # Columns that hold a place in the arena: (row, column) -> buffer and bytes into it.
        self.places: dict[tuple[int, int], tuple[str, int]] = {}
        self.made: set[str] = set()
        self.packed = self._share()

    def plan(self) -> Plan:
        self._touch(INPUT, 0)
        for node in self.nodes:
            self._add(node)
        end = len(self.rows)
        self._touch(self.program.output, end)
        offsets, arena_bytes = self.buffers.place()
        table = np.zeros((end, f.COLUMNS), np.int64)
        for index, row in enumerate(self.rows):
            for column, value in row.items():
                table[index, column] = value
        for (index, column), (buffer, extra) in self.places.items():
            table[index, column] = offsets[buffer] + extra
        values = {}
        for name, shape in self.shapes.items():
            buffer, extra = self._where(name)
            if buffer in offsets:
                values[name] = Place(offsets[buffer] + extra, shape)
        return Plan(table, self.consts.finish(), arena_bytes, values, tuple(self.steps))

    # Memory.

    def _where(self, name: str) -> tuple[str, int]:
        """Buffer of a value, and bytes into it."""
        whole, channel = self.parts.get(name, (name, 0))
        extra = channel * prod(self.shapes[name][1:]) * 4
        if whole == name:
            return name, 0
        outer, more = self._where(whole)
        return outer, more + extra

    def _touch(self, name: str, row: int) -> tuple[str, int]:
        buffer, extra = self._where(name)
        shape = self.shapes[buffer]
        self.buffers.need(buffer, 4 * (1 if shape == PICK else prod(shape)), row)
        return buffer, extra

    def _value(self, column: int, name: str) -> None:
        """The row under construction uses a value."""
        row = len(self.rows)
        self.places[row, column] = self._touch(name, row)

    def _scratch(self, column: int, name: str, size: int) -> None:
        row = len(self.rows)
        self.buffers.need(name, size, row)
        self.places[row, column] = name, 0

    def _sums(self, size: int) -> None:
        """The row under construction uses memory that nothing else does."""
        self._scratch(f.SUMS_AT, _unused(f"sums {len(self.rows)}", self.shapes), size)

    # Packed inputs.

    def _kind(self, operation: BinaryConv | Conv) -> Kind:
        if isinstance(operation, Conv):
            return "real"
        per_group = self.shapes[operation.x][0] // operation.groups
        if np.abs(operation.scale).max() > np.finfo(np.float32).max / 2:
            # A lookup's sums are in units of up to 2, which its scale makes up for.
            return "popcount"
        return layout.binary_kind(self.isa, per_group, operation.window.taps)

    def _key(self, operation: BinaryConv | Conv) -> tuple[Any, ...]:
        binary = isinstance(operation, BinaryConv)
        return (
            operation.x,
            self._kind(operation),
            operation.groups if binary else 1,
            operation.window.stride,
            operation.threshold.tobytes() if isinstance(operation, BinaryConv) else None,
        )

    def _share(self) -> dict[tuple[Any, ...], _Packed]:
        """The packed inputs by key, each laid out for all windows that read it."""
        windows: dict[tuple[Any, ...], list[Window]] = {}
        for node in self.nodes:
            if isinstance(node.operation, BinaryConv | Conv) and not self._in_place(node.operation):
                windows.setdefault(self._key(node.operation), []).append(node.operation.window)
        return {
            key: _Packed(
                _unused(f"packed {number} {key[0]}", self.shapes),
                key[1],
                plane_layout(tuple(dict.fromkeys(found)), *self.shapes[key[0]][1:]),
                tuple(dict.fromkeys(found)),
            )
            for number, (key, found) in enumerate(windows.items())
        }

    def _in_place(self, operation: Operation) -> bool:
        return isinstance(operation, Conv) and layout.reads_in_place(operation.window, *self.shapes[operation.x][1:])

    # Rows.

    def _finish(self, row: dict[int, int], step: Step) -> None:
        self.rows.append(row)
        self.steps.append(step)

    def _add(self, node: _Node) -> None:
        operation = node.operation
        packed = None
        if isinstance(operation, BinaryConv | Conv) and not self._in_place(operation):
            packed = self.packed[self._key(operation)]
            if packed.name not in self.made:
                self.made.add(packed.name)
                self._add_packing(operation, packed)
        channels, height, width = self.shapes[operation.inputs[0]]
        out_channels, out_height, out_width = self.shapes[node.out]
        row = {
            f.CHANNELS: channels,
            f.HEIGHT: height,
            f.WIDTH: width,
            f.OUT_CHANNELS: out_channels,
            f.OUT_HEIGHT: out_height,
            f.OUT_WIDTH: out_width,
            f.RESIDUALS: len(node.residuals),
        }
        for column, name in zip((f.RESIDUAL1_AT, f.RESIDUAL2_AT), node.residuals, strict=False):
            self._value(column, name)
        self._value(f.OUT_AT, node.out)
        if packed is None:
            self._value(f.X_AT, operation.inputs[0])
        match operation:
            case BinaryConv() | Conv():
                self._conv(row, node, operation, packed)
            case Pool():
                self._pool(row, operation)
            case Affine():
                self._map(row, node, operation)
            case Linear():
                row[f.OP] = f.Opcode.LINEAR
                row[f.MODE] = f.ACTIVATIONS.index(operation.activation)
                row[f.WEIGHT_AT] = self.consts.add(operation.weight)
                row[f.SHIFT_AT] = self.consts.row(operation.shift, operation.channels, 0.0)
            case Mean():
                row[f.OP] = f.Opcode.MEAN
            case Argmax():
                row[f.OP] = f.Opcode.ARGMAX
            case _:
                raise AssertionError(f"no row is made of {operation}")
        step = Step(
            node.out, operation.KIND, node.inputs, node.out if node.out in self.names else None, tuple(node.fused)
        )
        self._finish(row, step)

    def _add_packing(self, operation: BinaryConv | Conv, packed: _Packed) -> None:
        channels, height, width = self.shapes[operation.x]
        kind, groups = packed.kind, operation.groups if isinstance(operation, BinaryConv) else 1
        per_group = channels // groups
        phases = np.array(packed.planes.phases, np.int64).reshape(-1, 8)
        phases[:, 7] *= CODE_BYTES[kind]
        threshold = operation.threshold if isinstance(operation, BinaryConv) else np.zeros(1, np.float32)
        planes = layout.planes(kind, per_group)
        row = {
            f.OP: int(f.Opcode.PACK),
            f.CHANNELS: channels,
            f.HEIGHT: height,
            f.WIDTH: width,
            f.KIND: f.KINDS.index(kind),
            f.GROUPS: groups,
            f.PLANES: planes,
            f.PLANE_CHANNELS: layout.PLANE_CHANNELS[kind],
            f.PLANE_BYTES: packed.plane_bytes,
            f.STRIDE: packed.planes.stride,
            f.PITCH: packed.planes.pitch,
            f.PHASES: len(phases),
            f.PHASES_AT: self.consts.add(_int32(phases, operation)),
            f.THRESHOLD_AT: self.consts.add(threshold),
        }
        self._value(f.X_AT, operation.x)
        self._scratch(f.OUT_AT, packed.name, groups * planes * packed.plane_bytes + _PACKED_SLACK)
        self._finish(row, Step(packed.name, "pack", (operation.x,), None, ()))

    def _conv(self, row: dict[int, int], node: _Node, operation: BinaryConv | Conv, packed: _Packed | None) -> None:
        kind = self._kind(operation)
        channels, height, width = self.shapes[operation.x]
        per_group, window = channels // operation.groups, operation.window
        out_channels = operation.channels
        parts = layout.blocks(operation.groups, out_channels)
        if packed is None:
            starts: tuple[int, ...] = (0,)
            pitch, plane_bytes = width, height * width * 4
        else:
            pitch, plane_bytes = packed.planes.pitch, packed.plane_bytes
            starts = packed.planes.starts[packed.windows.index(window)]
            size = operation.groups * layout.planes(kind, per_group) * plane_bytes + _PACKED_SLACK
            self._scratch(f.X_AT, packed.name, size)
        lanes = self.isa.width if kind == "lookup" else self.isa.lanes
        # Of a lookup with few steps one byte would do.
        sum_bytes = 2 if kind == "lookup" else 4
        strip = max(1, min(window.size[0], _SUMS_BYTES // (layout.TILE_CHANNELS * sum_bytes) // pitch))
        positions = (strip - 1) * pitch + window.size[1]
        sums_stride = (positions + -positions % lanes) * sum_bytes
        row |= {
            f.OP: int(f.Opcode.CONV),
            f.KIND: f.KINDS.index(kind),
            f.GROUPS: operation.groups,
            f.PLANES: layout.planes(kind, per_group),
            f.PLANE_BYTES: plane_bytes,
            f.PITCH: pitch,
            f.STEPS: layout.planes(kind, per_group) * window.taps,
            f.OFFSETS_AT: self.consts.add(
                _int32(layout.offsets(kind, starts, per_group, plane_bytes, CODE_BYTES[kind]), operation)
            ),
            f.STRIP: strip,
            f.SUMS_STRIDE: sums_stride,
            f.PICK_AT: f.NOWHERE,
            f.FACTOR_AT: f.NOWHERE,
            f.BASE_AT: f.NOWHERE,
            f.SLOPE_AT: self.consts.row(operation.slope, out_channels, 1.0),
            f.CHANNEL_TO_AT: self.consts.add(_targets(out_channels, node.shuffle)),
        }
        self._sums(layout.TILE_CHANNELS * sums_stride + _PACKED_SLACK)
        if isinstance(operation, Conv):
            row[f.SCALE_AT] = self.consts.row(operation.scale, out_channels, 1.0)
            row[f.SHIFT_AT] = self.consts.row(operation.shift, out_channels, 0.0)
            weights = layout.real_weights(operation, parts)
        else:
            row[f.SHIFT_AT] = self.consts.row(None, out_channels, 0.0)
            if operation.pick is not None:
                self._value(f.PICK_AT, operation.pick)
            if operation.factor is not None:
                self._value(f.FACTOR_AT, operation.factor)
            weights = self._binary(row, kind, operation, parts)
        element = weights.array.itemsize
        row[f.WEIGHT_AT] = self.consts.add(weights.array)
        row[f.WEIGHT_STRIDE] = weights.array.shape[1] * element
        row[f.BLOCKS] = len(parts)
        table = [(*part, start * element) for part, start in zip(parts, weights.starts, strict=True)]
        row[f.BLOCKS_AT] = self.consts.add(_int32(np.array(table), operation))

    def _binary(
        self, row: dict[int, int], kind: Kind, operation: BinaryConv, parts: tuple[layout.Block, ...]
    ) -> layout.Weights:
        channels, height, width = self.shapes[operation.x]
        per_group = channels // operation.groups
        if kind == "lookup":
            # Exact, as the unit is a power of two and no scale is so large that this overflows (see _kind).
            row[f.SCALE_AT] = self.consts.add(operation.scale * np.float32(layout.unit(per_group)))
            row[f.CHUNK] = layout.chunk(per_group)
            row[f.TABLES_AT] = self.consts.add(layout.lookup_tables(per_group))
            return layout.lookup_weights(operation, channels, parts)
        row[f.SCALE_AT] = self.consts.add(operation.scale)
        row[f.CONSTANT] = operation.reduction(channels)
        bases = layout.popcount_bases(operation, height, width, channels)
        if bases is not None:
            row[f.BASE_AT] = self.consts.add(bases.array)
            row[f.BASE_STRIDE] = bases.array[0].nbytes
            row[f.BASE_ROWS] = bases.array.shape[2]
            row[f.BASE_CLASSES_AT] = self.consts.add(bases.classes)
        return layout.popcount_weights(operation, channels, parts)

    def _pool(self, row: dict[int, int], operation: Pool) -> None:
        window = operation.window
        sides = self.shapes[operation.x][1:]
        (rows, columns), (top, left) = window.kernel, window.padding
        padded_height = (window.size[0] - 1) * window.stride + rows
        pitch = (window.size[1] - 1) * window.stride + columns
        counted = []
        for axis in (0, 1):
            first = np.arange(window.size[axis]) * window.stride - window.padding[axis]
            inside = np.minimum(sides[axis], first + window.kernel[axis]) - np.maximum(0, first)
            counted.append(np.full_like(inside, window.kernel[axis]) if operation.count_padding else inside)
        row |= {
            f.OP: int(f.Opcode.POOL),
            f.STRIDE: window.stride,
            f.KERNEL_HEIGHT: rows,
            f.KERNEL_WIDTH: columns,
            f.PAD_TOP: top,
            f.PAD_LEFT: left,
            f.PADDED_HEIGHT: padded_height,
            f.PITCH: pitch,
            f.MODE: operation.mode == "max",
            f.ROWS_AT: self.consts.add(counted[0].astype(np.float32)),
            f.COLUMNS_AT: self.consts.add(counted[1].astype(np.float32)),
        }
        self._sums(padded_height * pitch * 4 + _PACKED_SLACK)

    def _map(self, row: dict[int, int], node: _Node, operation: Affine) -> None:
        channels = row[f.CHANNELS]
        row |= {
            f.OP: int(f.Opcode.MAP),
            f.SCALE_AT: self.consts.row(operation.scale, channels, 1.0),
            f.SHIFT_AT: self.consts.row(operation.shift, channels, 0.0),
            f.SLOPE_AT: self.consts.row(operation.slope, channels, 1.0),
            f.CHANNEL_TO_AT: self.consts.add(_targets(channels, node.shuffle)),
        }


def _targets(channels: int, groups: int) -> NDArray[np.int32]:
    """Where a channel shuffle puts each channel."""
    number = np.arange(channels)
    return (number % (channels // groups) * groups + number // (channels // groups)).astype(np.int32)


def _int32(values: NDArray[Any], operation: Operation) -> NDArray[np.int32]:
    if values.size and max(int(values.max()), -int(values.min())) > np.iinfo(np.int32).max:
        raise InvalidInputError(
            f"operation {operation.name!r} ({operation.KIND}): its weights, or its packed input, take over 2 GiB"
        )
    return values.astype(np.int32)
