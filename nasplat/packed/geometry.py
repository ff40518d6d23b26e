"""Where the pixels of a convolution's packed input lie, so that every tap of every output reads one straight line.

A plane holds one *phase* of the input for each remainder that a tap has modulo the stride: with stride 2, even or odd
rows and even or odd columns apart. Inside a phase, tap ``t`` of output ``(y, x)`` is at ``start(t) + y * pitch + x``,
whatever the padding, stride and dilation. So neighbouring outputs read neighbouring codes, over the ends of rows too:
what lies between the end of one row and the start of the next is computed and thrown away. The gap behind a row is the
right border of that row and the left border of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nasplat.packed.graph import Window


class Phase(NamedTuple):
    """One phase of a plane.

    Attributes:
        top: First row of the input that belongs to it.
        left: First column.
        first_row: Number of the first stored row among the phase's own; negative rows are padding.
        rows: Stored rows.
        real_rows: Rows of the phase that the input has.
        real_columns: Columns that the input has.
        lead: Codes before the first row: its left border.
        start: Code of the plane at which it begins.
    """

    top: int
    left: int
    first_row: int
    rows: int
    real_rows: int
    real_columns: int
    lead: int
    start: int


class Planes(NamedTuple):
    """Layout of one plane.

    Attributes:
        stride: Of the windows.
        pitch: Codes from row to row, in each phase.
        phases: In order.
        codes: Of a plane in all.
        starts: Per window, per tap in row-major order, the code of the plane that output ``(0, 0)`` reads.
    """

    stride: int
    pitch: int
    phases: tuple[Phase, ...]
    codes: int
    starts: tuple[tuple[int, ...], ...]


def plane_layout(windows: Sequence[Window], height: int, width: int) -> Planes:
    """Layout for an input that some convolutions of one stride read.

    Args:
        windows: Of the convolutions.
        height: Of the input, in pixels.
        width: Likewise.
    """
    stride = windows[0].stride
    # Per phase, rows and columns of its own that output (0, 0) reads, with the outputs of whose window.
    taps: list[list[tuple[tuple[int, int], int, int]]] = []
    rows: dict[tuple[int, int], list[int]] = {}
    columns: list[int] = []
    for window in windows:
        own = []
        for i in range(window.kernel[0]):
            for j in range(window.kernel[1]):
                row, top = divmod(i * window.dilation - window.padding[0], stride)
                column, left = divmod(j * window.dilation - window.padding[1], stride)
                own.append(((top, left), row, column))
                rows.setdefault((top, left), []).extend((row, row + window.size[0] - 1))
                columns += (column, column + window.size[1] - 1)
        taps.append(own)
    real = {key: (_count(height, key[0], stride), _count(width, key[1], stride)) for key in rows}
    lead = max(0, -min(columns))
    # Phases differ by at most one column; the pitch serves the widest, and the borders of all.
    gaps = [max(lead, max(columns) + 1 - real_columns) for _, real_columns in real.values()]
    widest = max(window.size[1] for window in windows)
    pitch = max(widest, *(count + gap for (_, count), gap in zip(real.values(), gaps, strict=True)))
    phases: dict[tuple[int, int], Phase] = {}
    start = 0
    for key in sorted(rows):
        first_row, last_row = min(rows[key]), max(rows[key])
        phase = Phase(*key, first_row, last_row - first_row + 1, *real[key], lead, start)
        phases[key] = phase
        start += lead + phase.rows * pitch
    starts = tuple(
        tuple(phases[key].start + lead + (row - phases[key].first_row) * pitch + column for key, row, column in own)
        for own in taps
    )
    return Planes(stride, pitch, tuple(phases.values()), start, starts)


def _count(pixels: int, first: int, stride: int) -> int:
    """Pixels ``first``, ``first + stride`` and so on that are there."""
    return max(0, -(-(pixels - first) // stride))


def border_classes(window: Window, pixels: int, axis: int) -> tuple[tuple[tuple[bool, ...], ...], tuple[int, ...]]:
    """Which taps lie inside the input, along one axis.

    Args:
        window: Of a convolution.
        pixels: Height or width of the input.
        axis: 0 for rows, 1 for columns.

    Returns:
        The patterns that occur, one flag a tap, and per output the number of its pattern.
    """
    patterns: dict[tuple[bool, ...], int] = {}
    numbers = []
    for out in range(window.size[axis]):
        begin = out * window.stride - window.padding[axis]
        pattern = tuple(0 <= begin + tap * window.dilation < pixels for tap in range(window.kernel[axis]))
        numbers.append(patterns.setdefault(pattern, len(patterns)))
    return tuple(patterns), tuple(numbers)
