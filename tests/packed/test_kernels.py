"""The vector code: what it computes on this processor, against NumPy, and what it is compiled to for others."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nasplat.packed import layout

llvm = pytest.importorskip("llvmlite.binding")

from llvmlite import ir  # noqa: E402

from nasplat.packed.kernels import emit  # noqa: E402
from nasplat.packed.kernels.emit import F32, I32, I64, OVERWRITE, Kind, Rows  # noqa: E402
from nasplat.packed.kernels.isa import (  # noqa: E402
    AVX2,
    AVX512,
    AVX512_VPOPCNTDQ,
    ISAS,
    NEON,
    PORTABLE,
    SSSE3,
    Isa,
    isa_of,
)

llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()

HOST = llvm.get_process_triple()

WIDE = (
    Isa("64 bytes, counting words", 64, "none", True, 32),
    Isa("64 bytes", 64, "none", False, 16),
)
"""As for 512-bit vectors but for the lookup: a compiler splits the vectors where they are smaller."""


def _runnable() -> tuple[Isa, ...]:
    features = llvm.get_host_cpu_features()
    if isa_of(HOST, "") is NEON:
        return NEON, PORTABLE, *WIDE
    own = [isa for isa, needs in ((AVX2, ("avx2", "fma")), (SSSE3, ("ssse3",))) if all(map(features.get, needs))]
    return *own, PORTABLE, *WIDE


RUNNABLE = _runnable()
LOOKING_UP = tuple(isa for isa in RUNNABLE if isa.lookup != "none")

Write = Callable[[Any, Sequence[Any]], Any]
"""Writes code at a builder's place, given the arguments; what it returns is an integer of 64 bits, or None."""


def module(write: Write, arguments: int) -> Any:
    """A module with one function of 64-bit integers, ``code``."""
    made = ir.Module()
    function = ir.Function(made, ir.FunctionType(I64, [I64] * arguments), "code")
    builder = ir.IRBuilder(function.append_basic_block())
    result = write(builder, function.args)
    builder.ret(emit.const(0) if result is None else result)
    parsed = llvm.parse_assembly(str(made))
    parsed.verify()
    return parsed


def optimised(parsed: Any, machine: Any) -> Any:
    """Optimised as Numba does."""
    options = llvm.create_pipeline_tuning_options(3)
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    return parsed


class Function:
    """Code compiled for this processor. Arrays are given as their addresses, floats as their bits."""

    def __init__(self, write: Write, arguments: int) -> None:
        target = llvm.Target.from_triple(HOST)
        features = llvm.get_host_cpu_features().flatten()
        machine = target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True)
        self._engine = llvm.create_mcjit_compiler(optimised(module(write, arguments), machine), machine)
        self._engine.finalize_object()
        kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * arguments)
        self._call = kind(self._engine.get_function_address("code"))

    def __call__(self, *arguments: NDArray[Any] | float) -> int:
        return int(self._call(*map(number, arguments)))


def number(value: NDArray[Any] | float) -> int:
    if isinstance(value, np.ndarray):
        return int(value.ctypes.data)
    if isinstance(value, float | np.float32):
        return int(np.float32(value).view(np.int32))
    return int(value)


def as_float(b: Any, value: Any) -> Any:
    return b.bitcast(b.trunc(value, I32), F32)


def as_bits(b: Any, value: Any) -> Any:
    return b.zext(b.bitcast(value, I32), I64)


def rows_of(arguments: Sequence[Any]) -> tuple[Rows, Sequence[Any]]:
    rows, count, out, one, two, how_many, *rest = arguments
    return Rows(rows, count, out, (one, two), how_many), rest


def write_tile(isa: Isa, kind: Kind, vectors: int, channels: int) -> Write:
    names = ("x", "offsets", "steps", "weights", "tables", "out", "stride", "mode")
    return lambda b, a: emit.tile(b, isa, kind, vectors, channels, **dict(zip(names, a, strict=True)))


def write_conv_rows(isa: Isa, kind: emit.Sums) -> Write:
    def write(b: Any, arguments: Sequence[Any]) -> None:
        to, (sums, pitch, bases, base_of, constant, *floats) = rows_of(arguments)
        given = dict(zip(("scale", "shift", "slope", "factor"), (as_float(b, value) for value in floats), strict=True))
        given |= {"sums": sums, "pitch": pitch, "bases": bases, "base_of": base_of}
        emit.conv_rows(b, isa, kind, to, constant=b.trunc(constant, I32), **given)

    return write


def write_pack_rows(isa: Isa, kind: Kind, stride: int) -> Write:
    names = ("x", "x_pitch", "plane", "thresholds", "channels", "rows", "count", "out", "gap")
    return lambda b, a: emit.pack_rows(b, isa, kind, stride, **dict(zip(names, a, strict=True)))


def write_pool_rows(isa: Isa, maximum: bool, stride: int) -> Write:
    def write(b: Any, arguments: Sequence[Any]) -> None:
        to, rest = rows_of(arguments)
        given = dict(zip(("x", "pitch", "height", "width", "rows", "columns"), rest, strict=True))
        emit.pool_rows(b, isa, maximum, stride, to, **given)

    return write


def write_map_rows(isa: Isa) -> Write:
    def write(b: Any, arguments: Sequence[Any]) -> None:
        to, (x, *floats) = rows_of(arguments)
        given = dict(zip(("scale", "shift", "slope"), (as_float(b, value) for value in floats), strict=True))
        emit.map_rows(b, isa, to, x=x, **given)

    return write


def write_fill(isa: Isa) -> Write:
    return lambda b, a: emit.fill_floats(b, isa, address=a[0], value=as_float(b, a[1]), count=a[2])


def write_dot(isa: Isa) -> Write:
    return lambda b, a: as_bits(b, emit.dot(b, isa, x=a[0], y=a[1], count=a[2]))


def write_total(isa: Isa) -> Write:
    return lambda b, a: as_bits(b, emit.total(b, isa, x=a[0], count=a[1]))


def write_peak(isa: Isa, kind: Kind) -> Write:
    return lambda b, a: b.sext(emit.peak(b, isa, kind, a[0]), I64)


@cache
def tile(isa: Isa, kind: Kind, vectors: int, channels: int) -> Function:
    return Function(write_tile(isa, kind, vectors, channels), 8)


@cache
def conv_rows(isa: Isa, kind: emit.Sums) -> Function:
    return Function(write_conv_rows(isa, kind), 15)


@cache
def pack_rows(isa: Isa, kind: Kind, stride: int) -> Function:
    return Function(write_pack_rows(isa, kind, stride), 9)


@cache
def pool_rows(isa: Isa, maximum: bool, stride: int) -> Function:
    return Function(write_pool_rows(isa, maximum, stride), 12)


@cache
def map_rows(isa: Isa) -> Function:
    return Function(write_map_rows(isa), 10)


named = pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)


def normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Of both signs, with zeros."""
    values = rng.standard_normal(shape).astype(np.float32)
    return np.where(rng.random(shape) < 0.1, np.float32(0), values)


def prelu(x: NDArray[np.float32], slope: np.float32) -> NDArray[np.float32]:
    return np.where(x > 0, x, slope * x)


class Fenced:
    """Memory for floats between numbers that have to stay."""

    def __init__(self, count: int) -> None:
        self._memory = np.full(count + 64, 12345, np.float32)
        self.inside = self._memory[32 : 32 + count]

    def intact(self) -> bool:
        return bool((self._memory[:32] == 12345).all() and (self._memory[32 + len(self.inside) :] == 12345).all())


# What it computes.


@pytest.mark.parametrize("isa", LOOKING_UP, ids=lambda isa: isa.name)
@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 3)), 4])
def test_tile_of_lookups(isa: Isa, vectors: int, channels: int) -> None:
    rng = np.random.default_rng([vectors, channels])
    function, pixels = tile(isa, "lookup", vectors, channels), vectors * isa.width
    for steps, unit in ((0, 1), (1, 1), (7, 2), (31, 1), (63, 2)):
        tables = layout.lookup_tables(1 if unit == 1 else 2)
        # Some codes lie outside the input.
        codes = rng.integers(0, 16, 3_000).astype(np.uint8) | rng.choice(np.uint8([0, 128]), 3_000, p=[0.8, 0.2])
        offsets = rng.integers(-900, 900, steps).astype(np.int32)
        low = 48 if unit == 2 else 0
        numbers = rng.integers(low, 64, (steps, channels)).astype(np.uint8)
        wanted = np.zeros((channels, pixels), np.int16)
        for offset, row in zip(offsets, numbers, strict=True):
            seen = codes[1_000 + offset :][:pixels]
            wanted += np.where(seen < 128, tables[row][:, seen & 15], 0).astype(np.int16)
        stride = pixels + 16
        for mode, kind in ((emit.OVERWRITE, np.int16), (emit.ADD, np.int16), (emit.NARROW, np.int8)):
            before = rng.integers(-100, 100, (channels, stride)).astype(kind)
            out = before.copy()
            start = codes[1_000:]
            function(start, offsets, steps, 2 * numbers, tables, out, stride * out.itemsize, mode)
            had = before[:, :pixels] if mode == emit.ADD else 0
            assert np.array_equal(out[:, :pixels], wanted + had)
            assert np.array_equal(out[:, pixels:], before[:, pixels:])


@named
@pytest.mark.parametrize("kind", ["popcount", "real"])
@pytest.mark.parametrize("vectors", [1, 2, 4])
def test_tile_of_words(isa: Isa, kind: Kind, vectors: int) -> None:
    for channels in (1, 3, 4):
        rng = np.random.default_rng([vectors, channels])
        function, pixels = tile(isa, kind, vectors, channels), vectors * isa.lanes
        for steps in (0, 1, 2, 40):
            offsets = rng.integers(-200, 200, steps).astype(np.int32)
            if kind == "popcount":
                codes: NDArray[Any] = rng.integers(0, 2**32, 500, dtype=np.uint32)
                weights: NDArray[Any] = rng.integers(0, 2**32, (steps, channels), dtype=np.uint32)
            else:
                codes, weights = normal(rng, 500), normal(rng, steps, channels)
            wanted = np.zeros((channels, pixels))
            for offset, row in zip(offsets, weights, strict=True):
                seen = codes[220 + offset :][:pixels]
                wanted += np.bitwise_count(seen ^ row[:, None]) if kind == "popcount" else seen * row[:, None]
            out = np.full((channels, pixels + 5), 77, np.int32 if kind == "popcount" else np.float32)
            function(codes[220:], offsets * 4, steps, weights, 0, out, (pixels + 5) * 4, OVERWRITE)
            np.testing.assert_allclose(out[:, :pixels], wanted, rtol=0 if kind == "popcount" else 1e-5, atol=1e-5)
            assert (out[:, pixels:] == 77).all()


@named
@pytest.mark.parametrize("kind", ["byte", "short", "word", "real"])
def test_rows_of_a_convolution(isa: Isa, kind: emit.Sums) -> None:
    rng = np.random.default_rng(0)
    function = conv_rows(isa, kind)
    for turn in range(60):
        rows, count = int(rng.integers(0, 4)), int(rng.integers(1, 40))
        pitch, residuals = count + int(rng.integers(0, 5)), int(rng.integers(0, 3))
        sums: NDArray[Any] = {
            "byte": lambda size: rng.integers(-127, 128, size).astype(np.int8),
            "short": lambda size: rng.integers(-(2**15), 2**15, size).astype(np.int16),
            "word": lambda size: rng.integers(0, 2**24, size).astype(np.int32),
            "real": lambda size: normal(rng, *size),
        }[kind]((rows + 10, pitch + 20)[:2])
        flat = sums.reshape(-1)
        seen = np.array([flat[row * pitch : row * pitch + count] for row in range(rows)]).reshape(rows, count)
        scale, shift, slope = normal(rng, 3)
        factor = np.float32(1) if turn % 2 else normal(rng, 1)[0]
        bases = rng.integers(0, 2**24, (3, count + 20)).astype(np.int32)
        base_of = rng.integers(0, 3, rows).astype(np.int32)
        constant, has_bases = int(rng.integers(0, 2**24)), kind == "word" and turn % 3 == 0
        if kind == "real":
            value = seen * scale + shift
        else:
            whole = seen.astype(np.int32)
            if kind == "word":
                width = bases.reshape(-1)[: 3 * count].reshape(3, count)
                whole = (width[base_of] if has_bases else constant) - 2 * whole
            value = whole.astype(np.float32) * scale * factor
        value = prelu(value, slope)
        others = normal(rng, 2, rows * count + 20)
        for other in others[:residuals]:
            value = value + other[: rows * count].reshape(rows, count)
        out = Fenced(rows * count)
        function(
            rows,
            count,
            out.inside,
            others[0],
            others[1],
            residuals,
            flat,
            pitch * flat.itemsize,
            bases if has_bases else 0,
            base_of,
            constant,
            scale,
            shift,
            slope,
            factor,
        )
        assert np.array_equal(out.inside.reshape(rows, count), value), turn
        assert out.intact(), turn


@named
@pytest.mark.parametrize("kind", ["lookup", "popcount", "real"])
@pytest.mark.parametrize("stride", [1, 2])
def test_packing(isa: Isa, kind: Kind, stride: int) -> None:
    rng = np.random.default_rng(stride)
    function, size = pack_rows(isa, kind, stride), emit.CODE_BYTES[kind]
    for turn in range(40):
        most = {"lookup": 4, "popcount": 32, "real": 1}[kind]
        channels = 1 + turn % most
        rows, count, gap = int(rng.integers(0, 5)), int(rng.integers(0, 35)), int(rng.integers(0, 9))
        width = count * stride + 1
        x = rng.choice(np.float32([-1, -0.0, 0, 0.5, 1, np.nan, np.inf, -np.inf]), (channels, rows * width + 80))
        thresholds = rng.choice(np.float32([-1, -0.0, 0, 0.5, 1, np.inf, -np.inf]), channels)
        seen = np.array([x[:, row * width : row * width + count * stride : stride] for row in range(rows)])
        seen = seen.reshape(rows, channels, count)
        if kind == "real":
            codes: NDArray[Any] = seen[:, 0]
        else:
            ones = (seen >= thresholds[:, None]).astype(np.uint32)
            codes = (ones << np.arange(channels, dtype=np.uint32)[:, None]).sum(axis=1, dtype=np.uint32)
        kinds: dict[Kind, Any] = {"lookup": np.uint8, "popcount": np.uint32, "real": np.float32}
        wanted = np.full((rows, count + gap), 128 if kind == "lookup" else 0, kinds[kind])
        wanted[:, :count] = codes
        # At most one vector, of codes or of padding, goes to nobody.
        behind = max(max(8, isa.lanes) * size, isa.width)
        memory = np.full(wanted.nbytes + behind + 64, 99, np.uint8)
        start = memory[:0] if rows == 0 else memory
        function(x, width * 4, x.strides[0], thresholds, channels, rows, count, start, gap)
        made = memory[: wanted.nbytes].view(kinds[kind]).reshape(wanted.shape)
        assert np.array_equal(made, wanted, equal_nan=kind == "real"), turn
        assert (memory[wanted.nbytes + behind :] == 99).all(), turn


@named
@pytest.mark.parametrize("maximum", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_pooling(isa: Isa, maximum: bool, stride: int) -> None:
    rng = np.random.default_rng(stride)
    function = pool_rows(isa, maximum, stride)
    for turn in range(40):
        tall, wide = (3, 3) if turn % 2 else rng.integers(1, 6, 2).tolist()
        rows, count, residuals = int(rng.integers(0, 4)), int(rng.integers(1, 40)), int(rng.integers(0, 3))
        pitch = (count - 1) * stride + wide
        x = normal(rng, (rows * stride + tall) * pitch + 100)
        plane = x[: (rows * stride + tall) * pitch].reshape(-1, pitch)
        taps = [
            plane[i : i + rows * stride : stride, j : j + (count - 1) * stride + 1 : stride]
            for i in range(tall)
            for j in range(wide)
        ]
        counted_rows = rng.integers(1, 6, rows).astype(np.float32)
        counted_columns = rng.integers(1, 6, count + 20).astype(np.float32)
        if maximum:
            value = np.max(taps, axis=0)
        else:
            value = np.zeros((rows, count), np.float32)
            for tap in taps:
                value = value + tap
            value = value / (counted_rows[:, None] * counted_columns[:count])
        others = normal(rng, 2, rows * count + 20)
        for other in others[:residuals]:
            value = value + other[: rows * count].reshape(rows, count)
        out = Fenced(rows * count)
        to = (rows, count, out.inside, others[0], others[1], residuals)
        function(*to, x, pitch * 4, tall, wide, counted_rows, counted_columns)
        assert np.array_equal(out.inside.reshape(rows, count), value), turn
        assert out.intact(), turn


@named
def test_maps(isa: Isa) -> None:
    rng = np.random.default_rng(3)
    for turn in range(40):
        rows, count, residuals = int(rng.integers(0, 3)), int(rng.integers(1, 70)), turn % 3
        x, others = normal(rng, rows * count + 20), normal(rng, 2, rows * count + 20)
        scale, shift, slope = normal(rng, 3)
        value = prelu(x * scale + shift, slope)
        for other in others[:residuals]:
            value = value + other
        out = Fenced(rows * count)
        to = (rows, count, out.inside, others[0], others[1], residuals)
        map_rows(isa)(*to, x, scale, shift, slope)
        assert np.array_equal(out.inside, value[: rows * count]), turn
        assert out.intact(), turn


@named
def test_filling(isa: Isa) -> None:
    function = Function(write_fill(isa), 3)
    for count in (0, 1, 3, 4, 5, 16, 17, 100):
        for value in (-np.inf, np.float32(0), np.float32(1.5)):
            memory = np.full(count + 50, 7, np.float32)
            function(memory, value, count)
            assert (memory[:count] == value).all()
            assert (memory[-(-count // isa.lanes) * isa.lanes :] == 7).all()


@named
def test_sums_and_products(isa: Isa) -> None:
    """Of whole numbers, so that the order of the additions does not matter; what lies behind is not touched."""
    dot, total = Function(write_dot(isa), 3), Function(write_total(isa), 2)
    rng = np.random.default_rng(4)
    for count in (*range(0, 140), 1_000):
        x, y = (np.append(rng.integers(-9, 10, count), [np.nan] * 64).astype(np.float32) for _ in range(2))
        for got, wanted in ((dot(x, y, count), np.dot(x[:count], y[:count])), (total(x, count), x[:count].sum())):
            assert np.uint32(got).view(np.float32) == wanted, count


@named
def test_peak_does_all_its_work(isa: Isa) -> None:
    """Step by step with NumPy: a loop that a compiler had simplified away would be a peak of nothing."""
    for kind in ("popcount", "lookup"):
        if kind == "lookup" and isa.lookup == "none":
            continue
        function = Function(write_peak(isa, kind), 1)
        element = np.uint32 if kind == "popcount" and isa.popcount else np.uint8
        ways = np.arange(isa.registers // 2, dtype=element)
        for turns in (0, 1, 2, 300):
            sums, moving = ways.copy(), np.ones(1, element)
            for _ in range(turns):
                if kind == "popcount":
                    sums += np.bitwise_count(moving ^ (7 * ways + 1))
                else:
                    sums += (7 * ways + moving % 16) * (moving < 128)
                moving += element(3)
            wanted = np.full(4 // sums.itemsize, np.bitwise_xor.reduce(sums)).view(np.int32)[0]
            assert function(turns) == wanted
        assert emit.peak_macs(isa, kind) == isa.registers // 2 * isa.width * (8 if kind == "popcount" else 4)


# Which processor has what.


@pytest.mark.parametrize(
    ("triple", "features", "isa"),
    [
        ("aarch64-unknown-linux-gnu", "", NEON),
        ("arm64-apple-darwin23.1.0", "+neon", NEON),
        ("x86_64-unknown-linux-gnu", "", PORTABLE),
        ("x86_64-unknown-linux-gnu", "+sse2,+sse3", PORTABLE),
        ("x86_64-unknown-linux-gnu", "+ssse3,-avx2", SSSE3),
        ("x86_64-apple-darwin", "+ssse3,+avx,+avx2", SSSE3),
        ("x86_64-unknown-linux-gnu", "+ssse3,+avx,+avx2,+fma", AVX2),
        ("x86_64-unknown-linux-gnu", "+ssse3,+avx2,+fma,-avx2", SSSE3),
        ("x86_64-unknown-linux-gnu", "-ssse3,+ssse3", SSSE3),
        ("x86_64-unknown-linux-gnu", "+avx2,+fma,+avx512f,+avx512dq", AVX2),
        ("x86_64-unknown-linux-gnu", "+avx2,+fma,+avx512f,+avx512bw,+avx512dq,+avx512vl", AVX512),
        ("x86_64-unknown-linux-gnu", "+avx2,+fma,+avx512bw,+avx512dq,+avx512vl,+avx512vpopcntdq", AVX512_VPOPCNTDQ),
        ("x86_64-unknown-linux-gnu", "+avx2,+fma,+avx512bw,-avx512vl,+avx512dq,+avx512vpopcntdq", AVX2),
        ("riscv64-unknown-linux-gnu", "+v", PORTABLE),
        ("i686-unknown-linux-gnu", "+ssse3,+avx2,+fma", PORTABLE),
        ("powerpc64le-unknown-linux-gnu", "", PORTABLE),
    ],
)
def test_instruction_set_of_a_target(triple: str, features: str, isa: Isa) -> None:
    assert isa_of(triple, features) is isa


def test_widths() -> None:
    assert {isa.name: (isa.width, isa.lanes) for isa in ISAS} == {
        "avx512-vpopcntdq": (64, 16),
        "avx512": (64, 16),
        "avx2": (32, 8),
        "ssse3": (16, 4),
        "neon": (16, 4),
        "portable": (16, 4),
    }


# What it is compiled to.

LINUX, APPLE, ARM = "x86_64-unknown-linux-gnu", "arm64-apple-darwin", "aarch64-unknown-linux-gnu"

TARGETS: dict[str, tuple[str, Isa]] = {
    "x86-64": (LINUX, PORTABLE),
    "x86-64-v2": (LINUX, SSSE3),
    "x86-64-v3": (LINUX, AVX2),
    "znver3": (LINUX, AVX2),
    "x86-64-v4": (LINUX, AVX512),
    "skylake-avx512": (LINUX, AVX512),
    "icelake-server": (LINUX, AVX512_VPOPCNTDQ),
    "znver4": (LINUX, AVX512_VPOPCNTDQ),
    "generic": (ARM, NEON),
    "cortex-a72": (ARM, NEON),
    "neoverse-v1": (ARM, NEON),
    "apple-m1": (APPLE, NEON),
}
"""Triple and instruction set by LLVM's name of the processor."""

LOOKUP = {
    "ssse3": r"\bpshufb\b.*%xmm",
    "avx2": r"\bvpshufb\b.*%ymm",
    "avx512": r"\bvpshufb\b.*%zmm",
    "neon": r"\btbl(\.16b)?\b",
}
"""The instruction of a table lookup, by kind."""

COUNT = {
    AVX512_VPOPCNTDQ: r"\bvpopcntd\b.*%zmm",
    AVX512: r"\bvpshufb\b.*%zmm",
    AVX2: r"\bvpshufb\b.*%ymm",
    SSSE3: r"\bpshufb\b.*%xmm",
    NEON: r"\bcnt(\.16b)?\b",
}
"""The instruction that counts the bits of all words of a vector, or of which counting them is made."""

MULTIPLY = {
    AVX512_VPOPCNTDQ: r"\bvfmadd\w*ps\b.*%zmm",
    AVX512: r"\bvfmadd\w*ps\b.*%zmm",
    AVX2: r"\bvfmadd\w*ps\b.*%ymm",
    NEON: r"\bfmla(\.4s)?\b",
}

SCALAR_COUNT = r"\bpopcnt[lq]?\b"


@cache
def assembly(cpu: str, kind: str, *details: Any) -> str:
    """Of one of the functions above, for a processor that need not be at hand."""
    triple, isa = TARGETS[cpu]
    writers: dict[str, tuple[Any, int]] = {
        "tile": (write_tile, 8),
        "conv_rows": (write_conv_rows, 15),
        "pack_rows": (write_pack_rows, 9),
        "pool_rows": (write_pool_rows, 12),
        "map_rows": (write_map_rows, 10),
        "dot": (write_dot, 3),
        "fill": (write_fill, 3),
        "total": (write_total, 2),
        "peak": (write_peak, 1),
    }
    writer, arguments = writers[kind]
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features="", opt=3)
    parsed = module(writer(isa, *details), arguments)
    parsed.triple = triple
    return str(machine.emit_assembly(optimised(parsed, machine)))


def innermost(text: str) -> list[list[str]]:
    """Loops without a loop inside: the instructions from a label to the first jump back to it."""
    lines = text.splitlines()
    labels: dict[str, int] = {}
    found: list[list[str]] = []
    begun = -1
    for place, line in enumerate(lines):
        label = re.match(r"^(\S+):", line)
        if label:
            labels[label[1]] = place
            continue
        target = re.match(r"^\s+(?:j\w+|b|b\.\w+|cbn?z|tbn?z)\s.*?(\S+)$", line)
        start = labels.get(target[1], -1) if target else -1
        if start > begun:
            found.append([one for one in lines[start:place] if one.startswith("\t")])
            begun = start
    return found


def loops_with(text: str, pattern: str, count: int) -> list[tuple[list[str], int]]:
    """The inner loops with an instruction, ``count`` times a turn, and to how many turns each is unrolled."""
    found = [(body, *divmod(times(body, pattern), count)) for body in innermost(text)]
    assert all(rest == 0 for _, _, rest in found)
    made = [(body, turns) for body, turns, _ in found if turns]
    assert made
    return made


def times(body: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, line)) for line in body)


processor = pytest.mark.parametrize("cpu", TARGETS)


@processor
def test_lookups_are_one_instruction_each(cpu: str) -> None:
    isa = TARGETS[cpu][1]
    if isa.lookup == "none":
        pytest.skip("has none")
    text = assembly(cpu, "tile", "lookup", 2, 4)
    for body, turns in loops_with(text, LOOKUP[isa.lookup], 8):
        # As many additions of bytes, and no sum leaves its register.
        assert times(body, r"\bv?paddb\b|\badd(\.16b)?\b.*(v\d+)") == 8 * turns
        assert times(body, r"\bv?mov\w*\b.*%[xyz]mm\d+,.*\(%r|\bst[rp]\b") == 0


@processor
def test_population_counts_are_of_vectors(cpu: str) -> None:
    isa = TARGETS[cpu][1]
    text = assembly(cpu, "tile", "popcount", 1, 4)
    assert not re.search(SCALAR_COUNT, text)
    if isa in COUNT:
        # With a table lookup, each half of a byte is counted by itself.
        assert loops_with(text, COUNT[isa], 4 if isa in (NEON, AVX512_VPOPCNTDQ) else 8)


@processor
def test_real_products_are_fused_where_they_can_be(cpu: str) -> None:
    isa = TARGETS[cpu][1]
    text = assembly(cpu, "tile", "real", 1, 4)
    if isa in MULTIPLY:
        assert loops_with(text, MULTIPLY[isa], 4)
        assert "fmaf" not in text


@pytest.mark.parametrize(
    "cpu",
    [cpu if cpu in ("znver4", "cortex-a72") else pytest.param(cpu, marks=pytest.mark.slow) for cpu in TARGETS],
)
def test_everything_compiles(cpu: str) -> None:
    isa = TARGETS[cpu][1]
    texts = [
        *(assembly(cpu, "conv_rows", kind) for kind in ("byte", "short", "word", "real")),
        *(assembly(cpu, "pack_rows", kind, stride) for kind in ("lookup", "popcount", "real") for stride in (1, 2)),
        *(assembly(cpu, "pool_rows", maximum, stride) for maximum in (True, False) for stride in (1, 2)),
        assembly(cpu, "map_rows"),
        assembly(cpu, "dot"),
        assembly(cpu, "fill"),
        assembly(cpu, "total"),
    ]
    vector = {64: "%zmm", 32: "%ymm"}.get(isa.width, r"%xmm" if TARGETS[cpu][0] == LINUX else r"\bv\d+\.|\bq\d+")
    for text in texts:
        assert re.search(vector, text)


@processor
def test_the_peak_is_of_vectors_in_registers(cpu: str) -> None:
    isa = TARGETS[cpu][1]
    ways = isa.registers // 2
    if isa.lookup != "none":
        assert loops_with(assembly(cpu, "peak", "lookup"), LOOKUP[isa.lookup], ways)
    if isa.popcount:
        text = assembly(cpu, "peak", "popcount")
        assert loops_with(text, COUNT[isa], ways)
        assert not re.search(SCALAR_COUNT, text)
