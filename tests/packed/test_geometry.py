"""The layout of packed planes, against the definition of a window, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nasplat.packed.geometry import Planes, border_classes, plane_layout
from nasplat.packed.graph import Window

OUTSIDE = -1


def stored(planes: Planes, height: int, width: int) -> np.ndarray:
    """A plane as it is packed: the number of the pixel at each code, or :data:`OUTSIDE`.

    Phase after phase: the border before the first row, then rows of ``pitch`` codes, each with the phase's pixels of
    one row of the input and padding behind them.
    """
    codes: list[int] = []
    for phase in planes.phases:
        assert len(codes) == phase.start
        assert phase.real_rows == len(range(phase.top, height, planes.stride))
        assert phase.real_columns == len(range(phase.left, width, planes.stride))
        codes += [OUTSIDE] * phase.lead
        for row in range(phase.first_row, phase.first_row + phase.rows):
            y = phase.top + row * planes.stride
            pixels = [y * width + x for x in range(phase.left, width, planes.stride)] if 0 <= y < height else []
            assert len(pixels) <= planes.pitch
            codes += pixels + [OUTSIDE] * (planes.pitch - len(pixels))
    assert len(codes) == planes.codes
    return np.array(codes)


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[Window], int, int]:
    """Windows of one stride over one input, at any place, and the input's height and width."""
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    stride = draw(st.integers(1, 4))
    pairs = [st.tuples(*[st.integers(low, high)] * 2) for low, high in ((1, 4), (1, 6), (-7, 7))]
    kernel, size, padding = pairs
    window = st.builds(Window, kernel, size, st.just(stride), st.integers(1, 4), padding)
    return draw(st.lists(window, min_size=1, max_size=3)), height, width


@settings(deadline=None, max_examples=400)
@given(windows())
@example(([Window((3, 3), (4, 4), 2, 1, (1, 1))], 8, 8))
@example(([Window((1, 1), (4, 4), 2), Window((1, 1), (4, 4), 2, 1, (-1, -1))], 8, 8))
@example(([Window((1, 1), (1, 1), 1, 1, (7, 7))], 1, 1))
@example(([Window((2, 2), (2, 2), 3, 4, (-7, 7))], 2, 9))
def test_every_tap_of_every_output_reads_its_pixel(case: tuple[list[Window], int, int]) -> None:
    given_windows, height, width = case
    planes = plane_layout(given_windows, height, width)
    codes = stored(planes, height, width)
    assert len(planes.starts) == len(given_windows)
    for window, starts in zip(given_windows, planes.starts, strict=True):
        assert len(starts) == window.taps
        for tap, start in enumerate(starts):
            i, j = divmod(tap, window.kernel[1])
            for y in range(window.size[0]):
                for x in range(window.size[1]):
                    row = y * window.stride + i * window.dilation - window.padding[0]
                    column = x * window.stride + j * window.dilation - window.padding[1]
                    inside = 0 <= row < height and 0 <= column < width
                    place = start + y * planes.pitch + x
                    assert 0 <= place < planes.codes
                    assert codes[place] == (row * width + column if inside else OUTSIDE)


def test_a_usual_convolution_has_one_border_between_rows() -> None:
    """The gap behind a row is the right border of that row and the left border of the next."""
    planes = plane_layout([Window((3, 3), (8, 10), 1, 1, (1, 1))], 8, 10)
    assert planes.pitch == 11
    assert planes.codes == 1 + 10 * 11
    assert planes.starts == (tuple(i * 11 + j for i in range(3) for j in range(3)),)
    (phase,) = planes.phases
    assert (phase.first_row, phase.rows, phase.lead) == (-1, 10, 1)


def test_a_convolution_of_single_pixels_has_no_border() -> None:
    planes = plane_layout([Window((1, 1), (8, 10))], 8, 10)
    assert (planes.pitch, planes.codes, planes.starts) == (10, 80, ((0,),))


def test_a_factorised_reduce_shares_a_plane_of_two_phases() -> None:
    """Even pixels for one half, odd ones for the other."""
    views = [Window((1, 1), (4, 5), 2, 1, (-shift, -shift)) for shift in (0, 1)]
    planes = plane_layout(views, 8, 10)
    assert [(phase.top, phase.left) for phase in planes.phases] == [(0, 0), (1, 1)]
    assert (planes.pitch, planes.codes, planes.starts) == (5, 40, ((0,), (20,)))


@pytest.mark.parametrize(
    ("window", "pixels", "patterns", "numbers"),
    [
        (Window((3, 1), (5, 1), 1, 1, (1, 0)), 5, [(0, 1, 1), (1, 1, 1), (1, 1, 0)], [0, 1, 1, 1, 2]),
        (Window((3, 1), (1, 1), 1, 1, (1, 0)), 1, [(0, 1, 0)], [0]),
        (Window((3, 1), (3, 1), 2, 2, (2, 0)), 5, [(0, 1, 1), (1, 1, 1), (1, 1, 0)], [0, 1, 2]),
        (Window((1, 1), (4, 1), 1, 1, (-2, 0)), 4, [(1,), (0,)], [0, 0, 1, 1]),
        (Window((2, 1), (2, 1)), 3, [(1, 1)], [0, 0]),
    ],
)
def test_border_classes_by_hand(window: Window, pixels: int, patterns: list, numbers: list[int]) -> None:
    assert border_classes(window, pixels, 0) == (
        tuple(tuple(bool(flag) for flag in pattern) for pattern in patterns),
        tuple(numbers),
    )
    turned = Window(*(pair[::-1] for pair in window[:2]), window.stride, window.dilation, window.padding[::-1])
    assert border_classes(turned, pixels, 1) == border_classes(window, pixels, 0)


@settings(deadline=None, max_examples=100)
@given(windows(), st.sampled_from([0, 1]))
def test_border_classes_by_definition(case: tuple[list[Window], int, int], axis: int) -> None:
    (window, *_), height, width = case
    pixels = (height, width)[axis]
    patterns, numbers = border_classes(window, pixels, axis)
    assert len(set(patterns)) == len(patterns)
    assert set(numbers) == set(range(len(patterns)))
    assert len(numbers) == window.size[axis]
    for out, number in enumerate(numbers):
        places = [
            out * window.stride + tap * window.dilation - window.padding[axis] for tap in range(window.kernel[axis])
        ]
        assert patterns[number] == tuple(0 <= place < pixels for place in places)
