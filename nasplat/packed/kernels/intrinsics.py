"""The vector code of :mod:`.emit` as functions that compiled Python can call; every argument is a number.

The processor is the one that Numba compiles for: this one, or one that ``NUMBA_CPU_NAME`` names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import event
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from nasplat.packed.kernels import emit
from nasplat.packed.kernels.isa import Isa, isa_of

# Numba finds out what an intrinsic is by calling a function with one argument for each of the call's, whose names and
# types it does not need: hence the bare letters below, with the meaning in each docstring.

_i, _f = types.int64, types.float32


def _target() -> tuple[str, str, str]:
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    return triple, cpu, features


def target_isa() -> Isa:
    """The instruction set that Numba compiles for."""
    triple, _, features = _target()
    return isa_of(triple, features)


def target_name() -> str:
    """The processor that Numba compiles for, by LLVM's name, e.g. ``znver3``."""
    return _target()[1]


ISA = target_isa()


@contextmanager
def when_compiling(call: Callable[[], None]) -> Iterator[None]:
    """Call something whenever Numba begins to compile a function, which it does not where its cache has it."""

    class Listener(event.Listener):  # type: ignore[misc]
        def on_start(self, event: Any) -> None:
            call()

        def on_end(self, event: Any) -> None:
            pass

    with event.install_listener("numba:compile", Listener()):
        yield


def tile_vectors(isa: Isa, kind: emit.Kind, channels: int) -> int:
    """Vectors of pixels in a tile of 1 to 4 output channels: as many as the registers hold sums for."""
    if isa.registers >= 32:
        return 4
    if kind == "popcount":
        # Without an instruction for it, counting needs registers of its own.
        return 2
    return 3 if channels == 4 else 4


def _tile(kind: emit.Kind, channels: int, vectors: int) -> Any:
    @intrinsic
    def tile(context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
        """x, offsets, steps, weights, tables, out, stride, mode."""

        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            if kind != "lookup" or ISA.lookup != "none":
                names = ("x", "offsets", "steps", "weights", "tables", "out", "stride", "mode")
                emit.tile(builder, ISA, kind, vectors, channels, **dict(zip(names, values, strict=True)))
            return context.get_dummy_value()

        return types.void(_i, _i, _i, _i, _i, _i, _i, _i), code

    return tile


def _conv_rows(kind: emit.Sums) -> Any:
    @intrinsic
    def conv_rows(
        context: Any,
        a: Any,
        b: Any,
        c: Any,
        d: Any,
        e: Any,
        f: Any,
        g: Any,
        h: Any,
        i: Any,
        j: Any,
        k: Any,
        m: Any,
        n: Any,
        o: Any,
        p: Any,
    ) -> Any:
        """Rows; then sums, pitch, bases, base_of, constant, scale, shift, slope, factor."""

        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            to, rest = _rows(values)
            names = ("sums", "pitch", "bases", "base_of", "constant", "scale", "shift", "slope", "factor")
            given = dict(zip(names, rest, strict=True))
            given["constant"] = builder.trunc(given["constant"], emit.I32)
            emit.conv_rows(builder, ISA, kind, to, **given)
            return context.get_dummy_value()

        return types.void(_i, _i, _i, _i, _i, _i, _i, _i, _i, _i, _i, _f, _f, _f, _f), code

    return conv_rows


def _rows(values: Any) -> tuple[emit.Rows, Any]:
    """The first six values as rows, and the others."""
    rows, count, out, one, two, how_many, *rest = values
    return emit.Rows(rows, count, out, (one, two), how_many), rest


def _pack_rows(kind: emit.Kind, stride: int) -> Any:
    @intrinsic
    def pack_rows(context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, i: Any) -> Any:
        """x, x_pitch, plane, thresholds, channels, rows, count, out, gap."""

        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            names = ("x", "x_pitch", "plane", "thresholds", "channels", "rows", "count", "out", "gap")
            emit.pack_rows(builder, ISA, kind, stride, **dict(zip(names, values, strict=True)))
            return context.get_dummy_value()

        return types.void(_i, _i, _i, _i, _i, _i, _i, _i, _i), code

    return pack_rows


def _pool_rows(maximum: bool, stride: int) -> Any:
    @intrinsic
    def pool_rows(
        context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, i: Any, j: Any, k: Any, m: Any
    ) -> Any:
        """Rows; then x, pitch, height, width, rows counted, columns counted."""

        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            to, rest = _rows(values)
            names = ("x", "pitch", "height", "width", "rows", "columns")
            emit.pool_rows(builder, ISA, maximum, stride, to, **dict(zip(names, rest, strict=True)))
            return context.get_dummy_value()

        return types.void(_i, _i, _i, _i, _i, _i, _i, _i, _i, _i, _i, _i), code

    return pool_rows


@intrinsic
def map_rows(context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, i: Any, j: Any) -> Any:
    """Rows; then x, scale, shift, slope."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        to, (x, scale, shift, slope) = _rows(values)
        emit.map_rows(builder, ISA, to, x=x, scale=scale, shift=shift, slope=slope)
        return context.get_dummy_value()

    return types.void(_i, _i, _i, _i, _i, _i, _i, _f, _f, _f), code


@intrinsic
def dot(context: Any, a: Any, b: Any, c: Any) -> Any:
    """x, y, count: the sum of products of floats."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, y, count = values
        return emit.dot(builder, ISA, x=x, y=y, count=count)

    return _f(_i, _i, _i), code


@intrinsic
def total(context: Any, a: Any, b: Any) -> Any:
    """x, count: the sum of floats."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, count = values
        return emit.total(builder, ISA, x=x, count=count)

    return _f(_i, _i), code


def _peak(kind: emit.Kind) -> Any:
    @intrinsic
    def peak(context: Any, a: Any) -> Any:
        """Turns."""

        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            if kind == "lookup" and ISA.lookup == "none":
                return emit.const(0)
            return builder.sext(emit.peak(builder, ISA, kind, values[0]), emit.I64)

        return _i(_i), code

    return peak


def _loader(kind: Any, result: Any) -> Any:
    @intrinsic
    def load(context: Any, a: Any) -> Any:
        """Address."""

        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            value = emit.load(builder, values[0], kind)
            if kind is emit.F32:
                return value
            return builder.sext(value, emit.I64) if kind is not emit.I8 else builder.zext(value, emit.I64)

        return result(_i), code

    return load


def _storer(kind: Any, given: Any) -> Any:
    @intrinsic
    def store(context: Any, a: Any, b: Any) -> Any:
        """Address, value."""

        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            address, value = values
            emit.store(builder, value if kind is emit.F32 else builder.trunc(value, kind), address)
            return context.get_dummy_value()

        return types.void(_i, given), code

    return store


@intrinsic
def fill_bytes(context: Any, a: Any, b: Any, c: Any) -> Any:
    """address, value, count: as memset."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        address, value, count = values
        pointer = builder.inttoptr(address, ir.PointerType(emit.I8))
        byte, no = builder.trunc(value, emit.I8), ir.Constant(emit.I1, 0)
        emit.call(builder, "llvm.memset.p0.i64", ir.VoidType(), pointer, byte, count, no)
        return context.get_dummy_value()

    return types.void(_i, _i, _i), code


@intrinsic
def fill_floats(context: Any, a: Any, b: Any, c: Any) -> Any:
    """Address, value, count."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        address, value, count = values
        emit.fill_floats(builder, ISA, address=address, value=value, count=count)
        return context.get_dummy_value()

    return types.void(_i, _f, _i), code


@intrinsic
def copy_bytes(context: Any, a: Any, b: Any, c: Any) -> Any:
    """to, from, count: as memcpy."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        target, source, count = values
        kind = ir.PointerType(emit.I8)
        to, start = builder.inttoptr(target, kind), builder.inttoptr(source, kind)
        emit.call(builder, "llvm.memcpy.p0.p0.i64", ir.VoidType(), to, start, count, ir.Constant(emit.I1, 0))
        return context.get_dummy_value()

    return types.void(_i, _i, _i), code


load_int, load_float = _loader(emit.I32, _i), _loader(emit.F32, _f)
store_int, store_float = _storer(emit.I32, _i), _storer(emit.F32, _f)
store_byte = _storer(emit.I8, _i)

lookup_tile1, lookup_tile2, lookup_tile3, lookup_tile4 = (
    _tile("lookup", q, tile_vectors(ISA, "lookup", q)) for q in (1, 2, 3, 4)
)
popcount_tile1, popcount_tile2, popcount_tile3, popcount_tile4 = (
    _tile("popcount", q, tile_vectors(ISA, "popcount", q)) for q in (1, 2, 3, 4)
)
real_tile1, real_tile2, real_tile3, real_tile4 = (_tile("real", q, tile_vectors(ISA, "real", q)) for q in (1, 2, 3, 4))
lookup_pair1, lookup_pair2, lookup_pair3, lookup_pair4 = (_tile("lookup", q, 2) for q in (1, 2, 3, 4))
lookup_tail1, lookup_tail2, lookup_tail3, lookup_tail4 = (_tile("lookup", q, 1) for q in (1, 2, 3, 4))
popcount_tail1, popcount_tail2, popcount_tail3, popcount_tail4 = (_tile("popcount", q, 1) for q in (1, 2, 3, 4))
real_tail1, real_tail2, real_tail3, real_tail4 = (_tile("real", q, 1) for q in (1, 2, 3, 4))

byte_rows, short_rows, word_rows, real_rows = (_conv_rows(kind) for kind in ("byte", "short", "word", "real"))
pack_lookup, pack_popcount, pack_real = (_pack_rows(kind, 1) for kind in ("lookup", "popcount", "real"))
pack_lookup2, pack_popcount2, pack_real2 = (_pack_rows(kind, 2) for kind in ("lookup", "popcount", "real"))
max_rows, max_rows2, average_rows, average_rows2 = (_pool_rows(m, s) for m in (True, False) for s in (1, 2))
lookup_peak, popcount_peak = _peak("lookup"), _peak("popcount")
