"""How a convolution's weights lie in memory for one instruction set, and which kernel multiplies with them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nasplat.errors import InvalidInputError
from nasplat.packed.geometry import border_classes
from nasplat.packed.graph import MAX_ELEMENTS, BinaryConv, Conv, Window
from nasplat.packed.kernels.emit import Kind
from nasplat.packed.kernels.isa import Isa

PLANE_CHANNELS: dict[Kind, int] = {"lookup": 4, "popcount": 32, "real": 1}
"""Channels of a group that one plane of codes holds."""

TILE_CHANNELS = 4
"""Most output channels that a tile computes."""

_LARGEST_SUM = 32_767
"""Of a lookup, whose sums have 16 bits."""


class Block(NamedTuple):
    """Some output channels of one group that are computed together.

    Attributes:
        group: Of the convolution.
        first: The first channel.
        channels: How many, at most :data:`TILE_CHANNELS`.
    """

    group: int
    first: int
    channels: int


class Weights(NamedTuple):
    """Weights in the order in which a kernel reads them.

    Attributes:
        array: ``(experts, channels * steps)``, uint8, uint32 or float32: block after block, in each step after step,
            in each the block's channels.
        starts: Where each block starts in a row, in elements.
    """

    array: NDArray[Any]
    starts: tuple[int, ...]


def planes(kind: Kind, per_group: int) -> int:
    """Planes of codes for a group of so many input channels."""
    return -(-per_group // PLANE_CHANNELS[kind])


def binary_kind(isa: Isa, per_group: int, taps: int) -> Kind:
    """The quicker kernel for a binary convolution of so many input channels per group."""
    if isa.lookup == "none" or per_group * taps > _LARGEST_SUM * unit(per_group):
        return "popcount"
    # For 64 pixels and 512-bit vectors: a lookup and an addition per plane of 4 channels, or an XOR, a count and an
    # addition for each 16 pixels per plane of 32 channels.
    if isa.popcount and 12 * planes("popcount", per_group) < 2 * planes("lookup", per_group):
        return "popcount"
    return "lookup"


def blocks(groups: int, channels: int) -> tuple[Block, ...]:
    """The output channels of each group in parts of nearly equal size."""
    per_group = channels // groups
    parts = -(-per_group // TILE_CHANNELS)
    bounds = [per_group * part // parts for part in range(parts + 1)]
    return tuple(
        Block(group, group * per_group + begin, end - begin)
        for group in range(groups)
        for begin, end in pairwise(bounds)
    )


def _in_blocks(rows: NDArray[Any], parts: tuple[Block, ...]) -> Weights:
    """From ``(experts, channels, steps)``."""
    experts, _, steps = rows.shape
    pieces = [
        rows[:, part.first : part.first + part.channels].transpose(0, 2, 1).reshape(experts, -1) for part in parts
    ]
    starts = np.cumsum([0, *(part.channels * steps for part in parts)])[:-1]
    return Weights(np.ascontiguousarray(np.concatenate(pieces, axis=1)), tuple(int(start) for start in starts))


def _bits(operation: BinaryConv, in_channels: int) -> NDArray[np.uint8]:
    """Weights as ``(experts, channels, taps, channels of a group)``, 0 or 1."""
    per_group = in_channels // operation.groups
    flat = np.unpackbits(operation.weight, axis=1, count=operation.window.taps * per_group, bitorder="little")
    return flat.reshape(operation.experts, operation.channels, operation.window.taps, per_group)


def _words(bits: NDArray[np.uint8], size: Literal[4, 32]) -> NDArray[Any]:
    """Bits of ``size`` channels to a number each, ``(experts, channels, taps, planes)``, uint8 or uint32."""
    missing = -bits.shape[-1] % size
    parts = np.pad(bits, ((0, 0), (0, 0), (0, 0), (0, missing))).reshape(*bits.shape[:-1], -1, size)
    if size == 4:  # packbits is slow with so few
        return parts[..., 0] | parts[..., 1] << 1 | parts[..., 2] << 2 | parts[..., 3] << 3
    return np.packbits(parts, axis=-1, bitorder="little").view("<u4")[..., 0].astype(np.uint32)


def _steps(words: NDArray[Any]) -> NDArray[Any]:
    """``(experts, channels, taps, planes)`` with plane after plane, in each tap after tap."""
    return words.transpose(0, 1, 3, 2).reshape(*words.shape[:2], -1)


def lookup_weights(operation: BinaryConv, in_channels: int, parts: tuple[Block, ...]) -> Weights:
    """Twice the number of the table for each plane and tap: see :func:`lookup_tables`."""
    per_group = in_channels // operation.groups
    words = _words(_bits(operation, in_channels), 4)
    held = np.full(words.shape[-1], 4)
    held[-1] = per_group - 4 * (words.shape[-1] - 1)
    numbers = ((held - 1) * 16).astype(np.uint8) + words
    return _in_blocks(_steps(2 * numbers), parts)


def unit(per_group: int) -> int:
    """What an entry of a lookup table counts for: 2 where all entries would be even."""
    return 1 if per_group % 2 else 2


def lookup_tables(per_group: int) -> NDArray[np.int8]:
    """``(64, 16)``: what a code adds to a sum, in units, by number of channels, weight and code.

    Row ``16 * (n - 1) + weight`` is for a plane of ``n`` channels: +1 for each equal bit, -1 for each other.
    """
    codes = np.arange(16)
    rows = [
        n - 2 * np.bitwise_count((codes ^ weight) & ((1 << n) - 1)).astype(int)
        for n in (1, 2, 3, 4)
        for weight in codes
    ]
    # Rows of odd n are not read where the unit is 2.
    return (np.array(rows) // unit(per_group)).astype(np.int8)


def chunk(per_group: int) -> int:
    """Steps after which eight-bit sums of :func:`lookup_tables` have to be added to wider ones."""
    return 127 // (min(4, per_group) // unit(per_group))


def popcount_weights(operation: BinaryConv, in_channels: int, parts: tuple[Block, ...]) -> Weights:
    """32 bits for each plane and tap."""
    return _in_blocks(_steps(_words(_bits(operation, in_channels), 32)), parts)


class Bases(NamedTuple):
    """What twice the population count is taken from, where some taps lie outside the input.

    Attributes:
        array: ``(experts, channels, row classes, width)``, int32.
        classes: Per output row its class, int32.
    """

    array: NDArray[np.int32]
    classes: NDArray[np.int32]


def popcount_bases(operation: BinaryConv, height: int, width: int, in_channels: int) -> Bases | None:
    """Bits of the taps inside, and twice the bits of the weights outside: there the input's codes are zero.

    None where no tap of any output lies outside.
    """
    window = operation.window
    (rows, row_of), (columns, column_of) = (
        border_classes(window, size, axis) for axis, size in enumerate((height, width))
    )
    # A tap is inside if its row and its column are; of large kernels, all taps for all classes would be too many.
    down, across = np.array(rows, np.int64), np.array(columns, np.int64)
    if down.all() and across.all():
        return None
    size = operation.experts * operation.channels * len(rows) * len(column_of)
    if size > MAX_ELEMENTS:
        raise InvalidInputError(
            f"operation {operation.name!r}: its tables for borders take {size} numbers; legal: up to {MAX_ELEMENTS}"
        )
    ones = _bits(operation, in_channels).sum(axis=-1, dtype=np.int64)
    ones = ones.reshape(operation.experts, operation.channels, *window.kernel)
    outside = ones.sum(axis=(2, 3))[..., None, None] - down @ ones @ across.T
    per_group = in_channels // operation.groups
    base = (np.outer(down.sum(axis=1), across.sum(axis=1)) * per_group + 2 * outside).astype(np.int32)
    return Bases(base[..., list(column_of)], np.array(row_of, np.int32))


def real_weights(operation: Conv, parts: tuple[Block, ...]) -> Weights:
    """A float for each input channel of the group and tap."""
    return _in_blocks(operation.weight.reshape(1, operation.channels, -1), parts)


def offsets(
    kind: Kind, starts: tuple[int, ...], per_group: int, plane_bytes: int, code_bytes: int
) -> NDArray[np.int64]:
    """Bytes from a group's first plane to what each step reads."""
    rows = np.arange(planes(kind, per_group))[:, None] * plane_bytes + np.array(starts)[None] * code_bytes
    return np.asarray(rows.reshape(-1), np.int64)


def reads_in_place(window: Window, height: int, width: int) -> bool:
    """Whether a real convolution can read the feature map as it is."""
    return window == Window((1, 1), (height, width))
