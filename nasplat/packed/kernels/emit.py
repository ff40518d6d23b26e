"""The inner loops as vector code of LLVM: what no loop over array elements would be compiled to.

Nothing here knows Numba. Each function writes its code at a builder's place, for a given :class:`.isa.Isa`, and can as
well be compiled for a processor that is not at hand. Addresses are 64-bit integers; lanes of a vector are pixels that
lie side by side in a plane. Reads may run past the last pixel by some vectors, writes of feature maps never do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

from llvmlite import ir

from nasplat.packed.kernels.isa import Isa

Value: TypeAlias = Any
"""A value of the code under construction."""

Builder: TypeAlias = Any
"""``llvmlite.ir.IRBuilder``."""

I1, I8, I16, I32, I64, F32 = (*(ir.IntType(bits) for bits in (1, 8, 16, 32, 64)), ir.FloatType())

Kind = Literal["lookup", "popcount", "real"]
"""How a convolution multiplies: tables of signed sums, XOR and population count, or floats."""

CODE_BYTES: dict[Kind, int] = {"lookup": 1, "popcount": 4, "real": 4}
"""Bytes of one pixel in one plane of the packed input."""

SUM_BYTES: dict[Kind, int] = {"lookup": 2, "popcount": 4, "real": 4}
"""Bytes of one pixel's sum in the scratch."""


# Small things.


def const(value: int, kind: Any = I64) -> Value:
    """A scalar constant."""
    return ir.Constant(kind, value)


def fill(kind: Any, lanes: int, value: float) -> Value:
    """A vector with one value in all lanes."""
    return ir.Constant(ir.VectorType(kind, lanes), [ir.Constant(kind, value)] * lanes)


def load(b: Builder, address: Value, kind: Any) -> Value:
    """What lies at an address of any alignment."""
    value = b.load(b.inttoptr(address, ir.PointerType(kind)), typ=kind)
    value.align = 1
    return value


def store(b: Builder, value: Value, address: Value) -> None:
    """Write at an address of any alignment."""
    b.store(value, b.inttoptr(address, ir.PointerType(value.type))).align = 1


def splat(b: Builder, scalar: Value, lanes: int) -> Value:
    """A vector with one scalar in all lanes."""
    one = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    picks = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return b.shuffle_vector(b.insert_element(one, scalar, const(0, I32)), one, picks)


def shuffle(b: Builder, first: Value, second: Value, picks: Sequence[int]) -> Value:
    """Lanes of two vectors, by number."""
    return b.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(picks)), list(picks)))


def call(b: Builder, name: str, result: Any, *arguments: Value) -> Value:
    """Call one of LLVM's intrinsic functions."""
    function = b.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = ir.Function(b.module, kind, name)
    return b.call(function, arguments)


def at(b: Builder, address: Value, index: Value, size: int) -> Value:
    """Address of an element of ``size`` bytes."""
    return b.add(address, b.mul(index, const(size)) if size != 1 else index)


def loop(
    b: Builder,
    count: Value,
    start: Sequence[Value],
    body: Callable[[Value, list[Value]], Sequence[Value]],
) -> list[Value]:
    """A counted loop, perhaps of no turns, that carries values in registers.

    Args:
        b: Where.
        count: Turns.
        start: What is carried into the first turn.
        body: From the turn's number and what is carried to what the next turn gets.

    Returns:
        What the last turn carried on.
    """
    before = b.block
    head, inside, after = (b.append_basic_block(name) for name in ("loop.head", "loop.body", "loop.end"))
    b.branch(head)
    b.position_at_end(head)
    turn = b.phi(I64)
    turn.add_incoming(const(0), before)
    carried = []
    for value in start:
        phi = b.phi(value.type)
        phi.add_incoming(value, before)
        carried.append(phi)
    b.cbranch(b.icmp_signed("<", turn, count), inside, after)
    b.position_at_end(inside)
    on = body(turn, list(carried))
    turn.add_incoming(b.add(turn, const(1)), b.block)
    for phi, value in zip(carried, on, strict=True):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(after)
    return carried


def _mask(b: Builder, left: Value, lanes: int) -> Value:
    """True in the first ``left`` lanes."""
    numbers = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
    bound = b.select(b.icmp_signed("<", left, const(lanes)), left, const(lanes))
    return b.icmp_signed("<", numbers, splat(b, b.trunc(bound, I32), lanes))


def load_some(b: Builder, address: Value, left: Value, lanes: int) -> Value:
    """The first ``left`` floats of a vector, zeros in the other lanes; memory behind them is not touched."""
    kind = ir.VectorType(F32, lanes)
    mask = _mask(b, left, lanes)
    pointer = b.inttoptr(address, ir.PointerType(kind))
    return call(b, f"llvm.masked.load.v{lanes}f32.p0", kind, pointer, const(1, I32), mask, fill(F32, lanes, 0.0))


def _store_some(b: Builder, value: Value, address: Value, left: Value, lanes: int) -> None:
    pointer = b.inttoptr(address, ir.PointerType(value.type))
    name = f"llvm.masked.store.v{lanes}f32.p0"
    call(b, name, ir.VoidType(), value, pointer, const(1, I32), _mask(b, left, lanes))


def store_row(
    b: Builder, isa: Isa, count: Value, out: Value, make: Callable[[Value, int], Value], added: Sequence[Value] = ()
) -> None:
    """Write ``count`` floats: ``make(i, lanes)`` from pixel ``i`` on, plus what lies at the addresses ``added``."""
    lanes = isa.lanes

    def value(first: Value) -> Value:
        total = make(first, lanes)
        for address in added:
            total = b.fadd(total, load(b, at(b, address, first, 4), total.type))
        return total

    whole = b.udiv(count, const(lanes))

    def body(turn: Value, _: list[Value]) -> list[Value]:
        first = b.mul(turn, const(lanes))
        store(b, value(first), at(b, out, first, 4))
        return []

    loop(b, whole, [], body)
    first = b.mul(whole, const(lanes))
    left = b.sub(count, first)
    with b.if_then(b.icmp_signed(">", left, const(0))):
        _store_some(b, value(first), at(b, out, first, 4), left, lanes)


def store_rows(
    b: Builder,
    isa: Isa,
    count: Value,
    out: Value,
    residuals: Sequence[Value],
    how_many: Value,
    make: Callable[[Value, int], Value],
) -> None:
    """:func:`store_row` with none, one or two addresses added, decided when it runs."""
    for number in range(len(residuals) + 1):
        with b.if_then(b.icmp_signed("==", how_many, const(number))):
            store_row(b, isa, count, out, make, residuals[:number])


def prelu(b: Builder, x: Value, slope: Value) -> Value:
    """``x > 0 ? x : slope * x``."""
    positive = b.fcmp_ordered(">", x, fill(F32, x.type.count, 0.0))
    return b.select(positive, x, b.fmul(slope, x))


# Convolution: sums of a tile of P vectors of pixels by Q output channels.


def tile(
    b: Builder,
    isa: Isa,
    kind: Kind,
    vectors: int,
    channels: int,
    *,
    x: Value,
    offsets: Value,
    steps: Value,
    weights: Value,
    tables: Value,
    out: Value,
    stride: Value,
    add: Value,
) -> None:
    """Sums over a reduction, of some vectors of pixels by some output channels.

    Args:
        b: Where.
        isa: For which processor.
        kind: How to multiply.
        vectors: Vectors of pixels.
        channels: Output channels.
        x: Address of the first pixel's code.
        offsets: Address of int32 per step: bytes from ``x`` to the step's codes.
        steps: How many; for a lookup so few that no sum leaves eight bits.
        weights: Address of the weights, ``(steps, channels)``: a byte each for a lookup, else 32 bits.
        tables: Address of the lookup tables, 16 bytes each; a weight is twice its table's number.
        out: Address of the sums of the first channel: 16 bits each for a lookup, else 32.
        stride: Bytes from one channel's sums to the next's.
        add: Whether to add to the sums that are there (1) or to overwrite them (0).
    """
    width, lanes = isa.width, isa.lanes
    code = ir.VectorType(*{"lookup": (I8, width), "popcount": (I32, lanes), "real": (F32, lanes)}[kind])
    zero = ir.Constant(code, [ir.Constant(code.element, 0.0 if kind == "real" else 0)] * code.count)
    weight_bytes = 1 if kind == "lookup" else 4

    def body(step: Value, sums: list[Value]) -> list[Value]:
        place = b.add(x, b.sext(load(b, at(b, offsets, step, 4), I32), I64))
        codes = [load(b, b.add(place, const(p * width)), code) for p in range(vectors)]
        row = at(b, weights, step, weight_bytes * channels)
        new = []
        for q in range(channels):
            place = b.add(row, const(q * weight_bytes))
            if kind == "lookup":
                number = b.zext(load(b, place, I8), I64)
                table = load(b, at(b, tables, number, 8), ir.VectorType(I8, 16))
                table = shuffle(b, table, table, [i % 16 for i in range(width)])
                new += [b.add(sums[q * vectors + p], _look_up(b, isa, table, codes[p])) for p in range(vectors)]
            else:
                weight = splat(b, load(b, place, code.element), lanes)
                for p in range(vectors):
                    total = sums[q * vectors + p]
                    if kind == "real":
                        new.append(call(b, f"llvm.fma.v{lanes}f32", code, codes[p], weight, total))
                    else:
                        bits = call(b, f"llvm.ctpop.v{lanes}i32", code, b.xor(codes[p], weight))
                        new.append(b.add(total, bits))
        return new

    sums = loop(b, steps, [zero] * (vectors * channels), body)

    def write(more: bool) -> None:
        for q in range(channels):
            row = b.add(out, b.mul(stride, const(q)))
            for p in range(vectors):
                _write_sums(b, kind, sums[q * vectors + p], b.add(row, const(p * code.count * SUM_BYTES[kind])), more)

    with b.if_else(b.icmp_signed("!=", add, const(0))) as (then, otherwise):
        with then:
            write(True)
        with otherwise:
            write(False)


def _write_sums(b: Builder, kind: Kind, sums: Value, address: Value, more: bool) -> None:
    if kind == "lookup":
        sums = b.sext(sums, ir.VectorType(I16, sums.type.count))
    if more:
        there = load(b, address, sums.type)
        sums = b.fadd(there, sums) if kind == "real" else b.add(there, sums)
    store(b, sums, address)


def _look_up(b: Builder, isa: Isa, table: Value, codes: Value) -> Value:
    """The table's bytes at the codes' low four bits, in each 128 bits apart; 0 where a code's highest bit is set."""
    name = {
        "avx512": "llvm.x86.avx512.pshuf.b.512",
        "avx2": "llvm.x86.avx2.pshuf.b",
        "ssse3": "llvm.x86.ssse3.pshuf.b.128",
        "neon": "llvm.aarch64.neon.tbl1.v16i8",
    }[isa.lookup]
    return call(b, name, codes.type, table, codes)


def conv_row(
    b: Builder,
    isa: Isa,
    kind: Kind,
    *,
    sums: Value,
    base: Value,
    constant: Value,
    count: Value,
    scale: Value,
    shift: Value,
    slope: Value,
    factor: Value,
    out: Value,
    residuals: Sequence[Value],
    how_many: Value,
) -> None:
    """One row of one output channel, from sums to floats.

    Binary: ``constant * sum`` for a lookup, ``base - 2 * sum`` for a population count; then ``* scale * factor``. Real:
    ``sum * scale + shift``. Then the PReLU, then the residuals are added.

    Args:
        b: Where.
        isa: For which processor.
        kind: What the sums are.
        sums: Address of the first sum.
        base: Address of an int32 per pixel, or 0: ``constant`` for all.
        constant: int32.
        count: Pixels.
        scale: float32.
        shift: float32.
        slope: float32.
        factor: float32.
        out: Where the row goes.
        residuals: Addresses of two rows of floats.
        how_many: Of them are added.
    """
    lanes = isa.lanes
    whole = ir.VectorType(I32, lanes)
    scales, slopes, factors = (splat(b, value, lanes) for value in (scale, slope, factor))
    shifts = splat(b, shift, lanes)
    constants = splat(b, constant, lanes)

    def finish(value: Value) -> Value:
        return prelu(b, value, slopes)

    def lookup(first: Value, lanes: int) -> Value:
        total = b.sext(load(b, at(b, sums, first, 2), ir.VectorType(I16, lanes)), whole)
        value = b.fmul(b.sitofp(b.mul(total, constants), ir.VectorType(F32, lanes)), scales)
        return finish(b.fmul(value, factors))

    def popcount(first: Value, lanes: int, bases: Callable[[Value], Value]) -> Value:
        total = load(b, at(b, sums, first, 4), whole)
        total = b.sub(bases(first), b.shl(total, fill(I32, lanes, 1)))
        return finish(b.fmul(b.fmul(b.sitofp(total, ir.VectorType(F32, lanes)), scales), factors))

    def real(first: Value, lanes: int) -> Value:
        total = load(b, at(b, sums, first, 4), ir.VectorType(F32, lanes))
        return finish(b.fadd(b.fmul(total, scales), shifts))

    if kind == "popcount":
        with b.if_else(b.icmp_signed("==", base, const(0))) as (inside, border):
            with inside:
                store_rows(b, isa, count, out, residuals, how_many, lambda i, n: popcount(i, n, lambda _: constants))
            with border:
                store_rows(
                    b,
                    isa,
                    count,
                    out,
                    residuals,
                    how_many,
                    lambda i, n: popcount(i, n, lambda first: load(b, at(b, base, first, 4), whole)),
                )
    else:
        store_rows(b, isa, count, out, residuals, how_many, lookup if kind == "lookup" else real)


# Packing: from rows of floats to rows of codes.


def _every(b: Builder, address: Value, lanes: int, stride: int) -> Value:
    """``lanes`` floats, ``stride`` (1 or 2) apart."""
    if stride == 1:
        return load(b, address, ir.VectorType(F32, lanes))
    both = load(b, address, ir.VectorType(F32, 2 * lanes))
    return shuffle(b, both, both, range(0, 2 * lanes, 2))


def pack_row(
    b: Builder,
    isa: Isa,
    kind: Kind,
    stride: int,
    *,
    x: Value,
    plane: Value,
    thresholds: Value,
    channels: Value,
    count: Value,
    out: Value,
) -> None:
    """Codes of one row of pixels: bit ``c`` says whether channel ``c`` reaches its threshold; a float is copied.

    Writes whole vectors, so up to a vector of codes behind the row as well.

    Args:
        b: Where.
        isa: For which processor.
        kind: What the codes are.
        stride: Take every pixel (1) or every other (2).
        x: Address of the first float of the first channel.
        plane: Bytes from one channel to the next.
        thresholds: Address of float32 per channel.
        channels: At most 4 for a lookup, 32 for a population count, 1 for floats.
        count: Codes.
        out: Where they go.
    """
    lanes = max(8, isa.lanes)
    vectors = b.udiv(b.add(count, const(lanes - 1)), const(lanes))
    words = ir.VectorType(I32, lanes)

    def body(turn: Value, _: list[Value]) -> list[Value]:
        first = b.mul(turn, const(lanes))
        place = at(b, x, first, 4 * stride)
        if kind == "real":
            store(b, _every(b, place, lanes, stride), at(b, out, first, 4))
            return []

        def channel(c: Value, carried: list[Value]) -> list[Value]:
            floats = _every(b, b.add(place, b.mul(c, plane)), lanes, stride)
            threshold = splat(b, load(b, at(b, thresholds, c, 4), F32), lanes)
            bit = splat(b, b.shl(const(1, I32), b.trunc(c, I32)), lanes)
            reached = b.fcmp_ordered(">=", floats, threshold)
            return [b.or_(carried[0], b.select(reached, bit, fill(I32, lanes, 0)))]

        (code,) = loop(b, channels, [fill(I32, lanes, 0)], channel)
        size = CODE_BYTES[kind]
        store(b, b.trunc(code, ir.VectorType(I8, lanes)) if size == 1 else code, at(b, out, first, size))
        return []

    assert words.count == lanes
    loop(b, vectors, [], body)


# The other operations.


def map_row(
    b: Builder,
    isa: Isa,
    *,
    x: Value,
    count: Value,
    scale: Value,
    shift: Value,
    slope: Value,
    out: Value,
    residuals: Sequence[Value],
    how_many: Value,
) -> None:
    """``prelu(x * scale + shift)`` plus residuals, for ``count`` floats of one channel."""
    scales, shifts, slopes = (splat(b, value, isa.lanes) for value in (scale, shift, slope))

    def make(first: Value, lanes: int) -> Value:
        floats = load(b, at(b, x, first, 4), ir.VectorType(F32, lanes))
        return prelu(b, b.fadd(b.fmul(floats, scales), shifts), slopes)

    store_rows(b, isa, count, out, residuals, how_many, make)


def pool_row(
    b: Builder,
    isa: Isa,
    maximum: bool,
    stride: int,
    *,
    x: Value,
    pitch: Value,
    height: Value,
    width: Value,
    count: Value,
    rows: Value,
    columns: Value,
    out: Value,
    residuals: Sequence[Value],
    how_many: Value,
) -> None:
    """Maximum or average of windows over a padded plane, plus residuals.

    An average adds the pixels in the order of rows and columns and then divides, as torch does. What pads an average is
    zero, which changes no sum.

    Args:
        b: Where.
        isa: For which processor.
        maximum: Which.
        stride: From window to window, 1 or 2.
        x: Address of the first window's first pixel.
        pitch: Bytes from row to row.
        height: Rows of a window.
        width: Pixels of a row of a window.
        count: Windows.
        rows: float32: rows that an average counts.
        columns: Address of float32 per window: columns that it counts.
        out: Where the row goes.
        residuals: Addresses of two rows of floats.
        how_many: Of them are added.
    """

    def make(first: Value, lanes: int) -> Value:
        corner = at(b, x, first, 4 * stride)
        start = fill(F32, lanes, float("-inf") if maximum else 0.0)

        def row(i: Value, carried: list[Value]) -> list[Value]:
            begin = b.add(corner, b.mul(i, pitch))

            def pixel(j: Value, carried: list[Value]) -> list[Value]:
                floats = _every(b, at(b, begin, j, 4), lanes, stride)
                if maximum:
                    return [b.select(b.fcmp_ordered(">", floats, carried[0]), floats, carried[0])]
                return [b.fadd(carried[0], floats)]

            return loop(b, width, carried, pixel)

        (total,) = loop(b, height, [start], row)
        if maximum:
            return total
        counted = load(b, at(b, columns, first, 4), total.type)
        return b.fdiv(total, b.fmul(counted, splat(b, rows, lanes)))

    store_rows(b, isa, count, out, residuals, how_many, make)


def dot(b: Builder, isa: Isa, *, x: Value, y: Value, count: Value) -> Value:
    """``sum(x[i] * y[i])`` of floats, as a float32. Memory behind them is not touched."""

    def term(index: Value, sums: Value, left: Value | None) -> Value:
        kind = sums.type
        one, other = (
            load(b, at(b, address, index, 4), kind)
            if left is None
            else load_some(b, at(b, address, index, 4), left, kind.count)
            for address in (x, y)
        )
        return call(b, f"llvm.fma.v{kind.count}f32", kind, one, other, sums)

    return _reduce(b, isa, count, term)


def total(b: Builder, isa: Isa, *, x: Value, count: Value) -> Value:
    """``sum(x[i])`` of floats, as a float32. Memory behind them is not touched."""

    def term(index: Value, sums: Value, left: Value | None) -> Value:
        place = at(b, x, index, 4)
        floats = load(b, place, sums.type) if left is None else load_some(b, place, left, sums.type.count)
        return b.fadd(sums, floats)

    return _reduce(b, isa, count, term)


def _reduce(b: Builder, isa: Isa, count: Value, term: Callable[[Value, Value, Value | None], Value]) -> Value:
    """Sum over ``count`` elements; ``term(index, sums, left)`` adds a vector of them, the first ``left`` if given."""
    # Several sums at a time, so that no addition waits for the one before it.
    lanes, ways = isa.lanes, 4
    whole = b.udiv(count, const(lanes * ways))

    def body(turn: Value, sums: list[Value]) -> list[Value]:
        first = b.mul(turn, const(lanes * ways))
        return [term(b.add(first, const(lanes * way)), part, None) for way, part in enumerate(sums)]

    sums = loop(b, whole, [fill(F32, lanes, 0.0)] * ways, body)
    first = b.mul(whole, const(lanes * ways))

    def tail(turn: Value, carried: list[Value]) -> list[Value]:
        index = b.add(first, b.mul(turn, const(lanes)))
        return [term(index, carried[0], b.sub(count, index))]

    rest = b.udiv(b.add(b.sub(count, first), const(lanes - 1)), const(lanes))
    (last,) = loop(b, rest, [sums[0]], tail)
    result = b.fadd(b.fadd(last, sums[1]), b.fadd(sums[2], sums[3]))
    while result.type.count > 1:
        half = result.type.count // 2
        lower, upper = shuffle(b, result, result, range(half)), shuffle(b, result, result, range(half, 2 * half))
        result = b.fadd(lower, upper)
    return b.extract_element(result, const(0, I32))
