"""Weights, tables and blocks in the order in which the kernels read them, against what they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from programs import Build, choose, window

pytest.importorskip("llvmlite")

from nasplat.packed import layout
from nasplat.packed.graph import INPUT, BinaryConv, Conv, Window
from nasplat.packed.kernels.isa import AVX2, AVX512, AVX512_VPOPCNTDQ, ISAS, NEON, PORTABLE, SSSE3


def drawn(seed: int) -> tuple[BinaryConv, tuple[int, int, int]]:
    """A convolution of experts or of one kernel, and the shape of its input."""
    rng = np.random.default_rng(seed)
    groups = choose(rng, 1, 2, 3, 4)
    shape = (groups * choose(rng, 1, 2, 3, 4, 5, 8, 31, 32, 33, 70), int(rng.integers(1, 7)), int(rng.integers(1, 7)))
    build = Build(rng, shape)
    options: dict[str, Any] = {"groups": groups, "window_": window(rng, shape[1:], kernel=3)}
    options["channels"] = groups * choose(rng, 1, 3, 4, 5, 9)
    if seed % 3 == 0:
        build.experts_conv(INPUT, 2, **options)
    else:
        build.binary_conv(INPUT, **options)
    operation = build.operations[-1]
    assert isinstance(operation, BinaryConv)
    return operation, shape


def bit(operation: BinaryConv, per_group: int, expert: int, channel: int, tap: int, inside: int) -> int:
    """As the class defines it."""
    place = tap * per_group + inside
    return int(operation.weight[expert * operation.channels + channel, place // 8]) >> place % 8 & 1


def unblocked(weights: layout.Weights, parts: tuple[layout.Block, ...], channels: int, steps: int) -> NDArray[Any]:
    """``(experts, channels, steps)``, read block by block as the executor does."""
    made = np.zeros((len(weights.array), channels, steps), weights.array.dtype)
    for part, start in zip(parts, weights.starts, strict=True):
        block = weights.array[:, start : start + steps * part.channels].reshape(-1, steps, part.channels)
        made[:, part.first : part.first + part.channels] = block.transpose(0, 2, 1)
    assert weights.array.shape[1] == channels * steps
    return made


@pytest.mark.parametrize("groups", [1, 2, 3, 12])
@pytest.mark.parametrize("per_group", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 64])
def test_blocks_cover_each_channel_once(groups: int, per_group: int) -> None:
    parts = layout.blocks(groups, groups * per_group)
    covered = [channel for part in parts for channel in range(part.first, part.first + part.channels)]
    assert covered == list(range(groups * per_group))
    for part in parts:
        assert 1 <= part.channels <= layout.TILE_CHANNELS
        assert part.first // per_group == (part.first + part.channels - 1) // per_group == part.group
    # As few as there can be, and none much smaller than another.
    assert len(parts) == groups * -(-per_group // layout.TILE_CHANNELS)
    sizes = {part.channels for part in parts}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("per_group", range(1, 10))
def test_lookup_tables_by_definition(per_group: int) -> None:
    tables = layout.lookup_tables(per_group)
    assert (tables.dtype, tables.shape) == (np.int8, (64, 16))
    unit = layout.unit(per_group)
    assert unit == (2 if per_group % 2 == 0 else 1)
    # With an even number of channels no plane has an odd one.
    for n in (1, 2, 3, 4)[unit - 1 :: unit]:
        for weight in range(1 << n):
            for code in range(1 << n):
                equal = sum((weight >> c & 1) == (code >> c & 1) for c in range(n))
                assert int(tables[16 * (n - 1) + weight, code]) * unit == equal - (n - equal)


@pytest.mark.parametrize("per_group", range(1, 40))
def test_chunks_of_eight_bits_are_as_long_as_they_can_be(per_group: int) -> None:
    largest = min(4, per_group) // layout.unit(per_group)
    assert layout.chunk(per_group) * largest <= 127 < (layout.chunk(per_group) + 1) * largest
    held = {4} if per_group >= 4 else set()
    held |= {per_group % 4 or 4}
    entries = [abs(int(v)) for n in held for v in layout.lookup_tables(per_group)[16 * (n - 1) : 16 * n].reshape(-1)]
    assert max(entries) == largest


@pytest.mark.parametrize("seed", range(30))
def test_weights_of_a_lookup_by_definition(seed: int) -> None:
    operation, shape = drawn(seed)
    per_group, taps = shape[0] // operation.groups, operation.window.taps
    parts = layout.blocks(operation.groups, operation.channels)
    planes = layout.planes("lookup", per_group)
    assert planes == -(-per_group // 4)
    weights = layout.lookup_weights(operation, shape[0], parts)
    assert weights.array.dtype == np.uint8
    numbers = unblocked(weights, parts, operation.channels, planes * taps)
    for expert in range(operation.experts):
        for channel in range(operation.channels):
            for plane in range(planes):
                for tap in range(taps):
                    inside = range(4 * plane, min(4 * plane + 4, per_group))
                    word = sum(bit(operation, per_group, expert, channel, tap, c) << c % 4 for c in inside)
                    assert numbers[expert, channel, plane * taps + tap] == 2 * (16 * (len(inside) - 1) + word)


@pytest.mark.parametrize("seed", range(30))
def test_weights_of_a_population_count_by_definition(seed: int) -> None:
    operation, shape = drawn(seed)
    per_group, taps = shape[0] // operation.groups, operation.window.taps
    parts = layout.blocks(operation.groups, operation.channels)
    planes = layout.planes("popcount", per_group)
    weights = layout.popcount_weights(operation, shape[0], parts)
    assert weights.array.dtype == np.uint32
    words = unblocked(weights, parts, operation.channels, planes * taps)
    for expert in range(operation.experts):
        for channel in range(operation.channels):
            for plane in range(planes):
                for tap in range(taps):
                    inside = range(32 * plane, min(32 * plane + 32, per_group))
                    word = sum(bit(operation, per_group, expert, channel, tap, c) << c % 32 for c in inside)
                    assert words[expert, channel, plane * taps + tap] == word


def test_real_weights_by_definition() -> None:
    rng = np.random.default_rng(0)
    build = Build(rng, (6, 5, 5))
    build.conv(INPUT, 2, 10, Window((2, 3), (4, 3)))
    operation = build.operations[-1]
    assert isinstance(operation, Conv)
    parts = layout.blocks(2, 10)
    rows = unblocked(layout.real_weights(operation, parts), parts, 10, 3 * 6)
    assert np.array_equal(rows[0].reshape(10, 3, 2, 3), operation.weight)


@pytest.mark.parametrize("seed", range(60))
def test_bases_of_population_counts_by_definition(seed: int) -> None:
    """``base - 2 * popcount`` is the sum, with the codes outside zero."""
    operation, (channels, height, width) = drawn(seed)
    window, per_group = operation.window, channels // operation.groups
    bases = layout.popcount_bases(operation, height, width, channels)
    outside = False
    for y in range(window.size[0]):
        for x in range(window.size[1]):
            for expert in range(operation.experts):
                for channel in range(operation.channels):
                    wanted = 0
                    for tap in range(window.taps):
                        i, j = divmod(tap, window.kernel[1])
                        row = y * window.stride + i * window.dilation - window.padding[0]
                        column = x * window.stride + j * window.dilation - window.padding[1]
                        if 0 <= row < height and 0 <= column < width:
                            wanted += per_group
                            continue
                        outside = True
                        # The XOR of its ones with zeros is counted, and must not be.
                        wanted += 2 * sum(bit(operation, per_group, expert, channel, tap, c) for c in range(per_group))
                    if bases is not None:
                        assert bases.array[expert, channel, bases.classes[y], x] == wanted
    assert outside == (bases is not None)
    if bases is not None:
        assert bases.array.dtype == bases.classes.dtype == np.int32
        assert len(bases.classes) == window.size[0]


def test_bases_of_a_large_kernel_take_little_memory() -> None:
    """65,536 taps, and as many classes of outputs: not their product."""
    side = 256
    operation = BinaryConv(
        name="y",
        x=INPUT,
        channels=1,
        groups=1,
        window=Window((side, side), (side, side), 1, 1, (side // 2, side // 2)),
        threshold=np.zeros(1, np.float32),
        weight=np.full((1, side * side // 8), 255, np.uint8),
        scale=np.ones(1, np.float32),
    )
    bases = layout.popcount_bases(operation, side, side, 1)
    assert bases is not None
    # At the first output, a quarter of the taps lies inside; each one outside is counted twice.
    assert bases.array[0, 0, bases.classes[0], 0] == 128 * 128 + 2 * (256 * 256 - 128 * 128)


def test_offsets_are_of_planes_and_then_of_taps() -> None:
    assert layout.offsets("lookup", (3, 5), 9, 100, 1).tolist() == [3, 5, 103, 105, 203, 205]
    assert layout.offsets("popcount", (3, 5), 33, 400, 4).tolist() == [12, 20, 412, 420]
    assert layout.offsets("real", (0,), 3, 64, 4).tolist() == [0, 64, 128]


def test_which_kernel_multiplies() -> None:
    """A table lookup where there is one, but for sums that 16 bits do not hold, and many channels and VPOPCNTDQ."""
    for isa in (SSSE3, NEON, AVX2, AVX512):
        for per_group in (1, 4, 32, 1_000):
            assert layout.binary_kind(isa, per_group, 9) == "lookup"
        assert layout.binary_kind(isa, 1, 32_767) == "lookup"
        assert layout.binary_kind(isa, 1, 32_768) == "popcount"
        # Of an even number of channels, halves are added up.
        assert layout.binary_kind(isa, 2, 32_767) == "lookup"
        assert layout.binary_kind(isa, 2, 32_768) == "popcount"
    assert {layout.binary_kind(PORTABLE, per_group, 9) for per_group in (1, 64)} == {"popcount"}
    wide = AVX512_VPOPCNTDQ
    assert [layout.binary_kind(wide, per_group, 9) for per_group in (1, 12, 24, 32, 64, 256)] == [
        "lookup",
        "lookup",
        "lookup",
        "popcount",
        "popcount",
        "popcount",
    ]


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_no_sum_leaves_its_type(isa: Any) -> None:
    for per_group in (1, 2, 3, 4, 5, 6, 31, 32, 64, 255, 256):
        for taps in (1, 9, 25, 128, 1_024, 32_767, 65_536):
            if layout.binary_kind(isa, per_group, taps) == "lookup":
                assert per_group * taps // layout.unit(per_group) <= 2**15 - 1


def test_a_convolution_of_single_pixels_reads_the_feature_map_itself() -> None:
    assert layout.reads_in_place(Window((1, 1), (4, 5)), 4, 5)
    for other in (
        Window((1, 1), (4, 5), 1, 1, (-1, 0)),
        Window((1, 1), (4, 4)),
        Window((1, 1), (2, 3), 2),
        Window((1, 2), (4, 5)),
        Window((1, 1), (4, 5), 2),
    ):
        assert not layout.reads_in_place(other, 4, 5)
