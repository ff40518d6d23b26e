"""The inner loops as vector code of LLVM: what no loop over array elements would be compiled to.

Nothing here knows Numba. Each function writes its code at a builder's place, for a given :class:`.isa.Isa`, and can as
well be compiled for a processor that is not at hand. Addresses are 64-bit integers; lanes of a vector are pixels that
lie side by side in a plane. Reads may run past the last pixel by some vectors, writes of feature maps never do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from llvmlite import ir

from nasplat.packed.kernels.isa import Isa

Value: TypeAlias = Any
"""A value of the code under construction."""

Builder: TypeAlias = Any
"""``llvmlite.ir.IRBuilder``."""

I1, I8, I16, I32, I64, F32 = (*(ir.IntType(bits) for bits in (1, 8, 16, 32, 64)), ir.FloatType())

Kind = Literal["lookup", "popcount", "real"]
"""How a convolution multiplies: tables of signed sums, XOR and population count, or floats."""

PADDING: dict[Kind, int] = {"lookup": 0x80, "popcount": 0, "real": 0}
"""What each byte of a code is outside the input. Of a lookup, the highest bit is set, so it looks nothing up."""

CODE_BYTES: dict[Kind, int] = {"lookup": 1, "popcount": 4, "real": 4}
"""Bytes of one pixel in one plane of the packed input."""

Sums = Literal["byte", "short", "word", "real"]
"""How the sums of one pixel lie in the scratch: integers of 8, 16 or 32 bits, or floats."""

SUM_BYTES: dict[Sums, int] = {"byte": 1, "short": 2, "word": 4, "real": 4}
"""Bytes of a sum."""

OVERWRITE, ADD, NARROW = 0, 1, 2
"""What a tile does with its sums: overwrite those that are there, add to them, or, for a lookup, write bytes."""


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


class Rows(NamedTuple):
    """Rows of floats to be written, and what is added to them. All are values of the code under construction.

    Attributes:
        rows: How many.
        count: Floats in each.
        out: Address of the first; they follow each other.
        residuals: Addresses of two such arrays of rows.
        how_many: Of these are added.
    """

    rows: Value
    count: Value
    out: Value
    residuals: tuple[Value, Value]
    how_many: Value


def write_rows(b: Builder, isa: Isa, to: Rows, make: Callable[[Value], Callable[[Value], Value]]) -> None:
    """Write rows of floats.

    Args:
        b: Where.
        isa: For which processor.
        to: What is written.
        make: From a row's number to a function from a pixel's number to the vector that starts there.
    """
    lanes = isa.lanes
    whole = b.udiv(to.count, const(lanes))
    first_left = b.mul(whole, const(lanes))
    left = b.sub(to.count, first_left)

    def rows(residuals: Sequence[Value]) -> None:
        def row(number: Value, _: list[Value]) -> list[Value]:
            begin = b.mul(b.mul(number, to.count), const(4))
            vector = make(number)

            def value(first: Value) -> Value:
                total = vector(first)
                for address in residuals:
                    total = b.fadd(total, load(b, at(b, b.add(address, begin), first, 4), total.type))
                return total

            out = b.add(to.out, begin)

            def body(turn: Value, _: list[Value]) -> list[Value]:
                first = b.mul(turn, const(lanes))
                store(b, value(first), at(b, out, first, 4))
                return []

            loop(b, whole, [], body)
            with b.if_then(b.icmp_signed(">", left, const(0))):
                _store_some(b, value(first_left), at(b, out, first_left, 4), left, lanes)
            return []

        loop(b, to.rows, [], row)

    for number in range(len(to.residuals) + 1):
        with b.if_then(b.icmp_signed("==", to.how_many, const(number))):
            rows(to.residuals[:number])


def prelu(b: Builder, x: Value, slope: Value) -> Value:
    """``x > 0 ? x : slope * x`` for a finite slope; of zeros, the sign may differ."""
    # By the sign's bit, which processors can select by without a comparison.
    bits = b.bitcast(x, ir.VectorType(I32, x.type.count))
    negative = b.icmp_signed("<", bits, fill(I32, x.type.count, 0))
    return b.select(negative, b.fmul(slope, x), x)


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
    mode: Value,
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
        out: Address of the sums of the first channel: 16 bits each for a lookup, or 8 in mode ``NARROW``; else 32.
        stride: Bytes from one channel's sums to the next's.
        mode: One of ``OVERWRITE``, ``ADD`` and ``NARROW``.
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

    def write(how: int) -> None:
        size = sum_bytes(kind, how)
        for q in range(channels):
            row = b.add(out, b.mul(stride, const(q)))
            for p in range(vectors):
                _write_sums(b, kind, sums[q * vectors + p], b.add(row, const(p * code.count * size)), how)

    for how in (OVERWRITE, ADD, NARROW) if kind == "lookup" else (OVERWRITE,):
        with b.if_then(b.icmp_signed("==", mode, const(how))):
            write(how)


def sum_bytes(kind: Kind, mode: int) -> int:
    """Bytes of a sum that a tile writes."""
    if kind == "lookup":
        return 1 if mode == NARROW else 2
    return 4


def _write_sums(b: Builder, kind: Kind, sums: Value, address: Value, mode: int) -> None:
    if kind == "lookup" and mode != NARROW:
        sums = b.sext(sums, ir.VectorType(I16, sums.type.count))
    if mode == ADD:
        sums = b.add(load(b, address, sums.type), sums)
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


def conv_rows(
    b: Builder,
    isa: Isa,
    kind: Sums,
    to: Rows,
    *,
    sums: Value,
    pitch: Value,
    bases: Value,
    base_of: Value,
    constant: Value,
    scale: Value,
    shift: Value,
    slope: Value,
    factor: Value,
) -> None:
    """Rows of one output channel, from sums to floats.

    ``sum * scale * factor`` for sums of bytes and shorts, ``(base - 2 * sum) * scale * factor`` for words,
    ``sum * scale + shift`` for floats. Then the PReLU, then the residuals are added.

    Args:
        b: Where.
        isa: For which processor.
        kind: What the sums are.
        to: Where the rows go.
        sums: Address of the first sum.
        pitch: Bytes from row to row of the sums.
        bases: For words, address of rows of int32 per pixel, or 0: ``constant`` for all.
        base_of: Address of int32 per row: number of its row of bases.
        constant: int32.
        scale: float32.
        shift: float32.
        slope: float32.
        factor: float32.
    """
    lanes = isa.lanes
    whole, floats = ir.VectorType(I32, lanes), ir.VectorType(F32, lanes)
    scales, slopes, shifts = (splat(b, value, lanes) for value in (scale, slope, shift))
    element = {"byte": I8, "short": I16, "word": I32, "real": F32}[kind]

    def rows(factors: Value | None, has_bases: bool) -> None:
        def row(number: Value) -> Callable[[Value], Value]:
            begin = b.add(sums, b.mul(number, pitch))
            base = None
            if has_bases:
                class_ = b.sext(load(b, at(b, base_of, number, 4), I32), I64)
                base = at(b, bases, b.mul(class_, to.count), 4)

            def vector(first: Value) -> Value:
                total = load(b, at(b, begin, first, SUM_BYTES[kind]), ir.VectorType(element, lanes))
                if kind == "real":
                    return prelu(b, b.fadd(b.fmul(total, scales), shifts), slopes)
                if kind == "word":
                    start = load(b, at(b, base, first, 4), whole) if has_bases else splat(b, constant, lanes)
                    total = b.sub(start, b.shl(total, fill(I32, lanes, 1)))
                else:
                    total = b.sext(total, whole)
                value = b.fmul(b.sitofp(total, floats), scales)
                return prelu(b, value if factors is None else b.fmul(value, factors), slopes)

            return vector

        write_rows(b, isa, to, row)

    def with_factor(factors: Value | None) -> None:
        if kind != "word":
            rows(factors, has_bases=False)
            return
        with b.if_else(b.icmp_signed("==", bases, const(0))) as (inside, border):
            with inside:
                rows(factors, has_bases=False)
            with border:
                rows(factors, has_bases=True)

    if kind == "real":
        rows(None, has_bases=False)
        return
    with b.if_else(b.fcmp_ordered("==", factor, ir.Constant(F32, 1.0))) as (plain, excited):
        with plain:
            with_factor(None)
        with excited:
            with_factor(splat(b, factor, lanes))


# Packing: from rows of floats to rows of codes.


def _every(b: Builder, address: Value, lanes: int, stride: int) -> Value:
    """``lanes`` floats, ``stride`` (1 or 2) apart."""
    if stride == 1:
        return load(b, address, ir.VectorType(F32, lanes))
    both = load(b, address, ir.VectorType(F32, 2 * lanes))
    return shuffle(b, both, both, range(0, 2 * lanes, 2))


def pack_rows(
    b: Builder,
    isa: Isa,
    kind: Kind,
    stride: int,
    *,
    x: Value,
    x_pitch: Value,
    plane: Value,
    thresholds: Value,
    channels: Value,
    rows: Value,
    count: Value,
    out: Value,
    gap: Value,
) -> None:
    """Codes of rows of pixels: bit ``c`` says whether channel ``c`` reaches its threshold; a float is copied.

    Writes whole vectors: the rows in their order, and behind the last one perhaps a vector that belongs to nobody.

    Args:
        b: Where.
        isa: For which processor.
        kind: What the codes are.
        stride: Take every pixel (1) or every other (2) of a row.
        x: Address of the first float of the first channel.
        x_pitch: Bytes from row to row of ``x``.
        plane: Bytes from one channel to the next.
        thresholds: Address of float32 per channel.
        channels: At most 4 for a lookup, 32 for a population count; not read for floats.
        rows: How many.
        count: Codes of a row.
        out: Where the first row goes.
        gap: Codes of padding behind each row.
    """
    lanes = max(8, isa.lanes)
    size = CODE_BYTES[kind]
    vectors = b.udiv(b.add(count, const(lanes - 1)), const(lanes))
    words = ir.VectorType(I32, lanes)
    gap_vectors = b.udiv(b.add(b.mul(gap, const(size)), const(isa.width - 1)), const(isa.width))
    padding = fill(I8, isa.width, PADDING[kind])
    pitch = b.mul(b.add(count, gap), const(size))

    def every(vector: Callable[[Value], Value]) -> None:
        """Rows of vectors; ``vector`` makes one from the address of its first pixel."""

        def row(number: Value, _: list[Value]) -> list[Value]:
            begin, to = b.add(x, b.mul(number, x_pitch)), b.add(out, b.mul(number, pitch))

            def body(turn: Value, _: list[Value]) -> list[Value]:
                first = b.mul(turn, const(lanes))
                store(b, vector(at(b, begin, first, 4 * stride)), at(b, to, first, size))
                return []

            loop(b, vectors, [], body)
            behind = at(b, to, count, size)

            # Whole vectors: what lies behind a row is written after it.
            def fill_gap(turn: Value, _: list[Value]) -> list[Value]:
                store(b, padding, at(b, behind, turn, isa.width))
                return []

            loop(b, gap_vectors, [], fill_gap)
            return []

        loop(b, rows, [], row)

    def reached(place: Value, threshold: Value) -> Value:
        return b.fcmp_ordered(">=", _every(b, place, lanes, stride), splat(b, threshold, lanes))

    if kind == "real":
        every(lambda place: _every(b, place, lanes, stride))
    elif kind == "popcount":

        def counted(place: Value) -> Value:
            def channel(c: Value, code: list[Value]) -> list[Value]:
                mask = reached(b.add(place, b.mul(c, plane)), load(b, at(b, thresholds, c, 4), F32))
                bit = splat(b, b.shl(const(1, I32), b.trunc(c, I32)), lanes)
                return [b.or_(code[0], b.select(mask, bit, fill(I32, lanes, 0)))]

            return loop(b, channels, [fill(I32, lanes, 0)], channel)[0]

        every(counted)
    else:
        for number in range(1, 5):
            with b.if_then(b.icmp_signed("==", channels, const(number))):
                limits = [load(b, b.add(thresholds, const(4 * c)), F32) for c in range(number)]

                def looked_up(place: Value, limits: list[Value] = limits) -> Value:
                    code = fill(I32, lanes, 0)
                    for c, limit in enumerate(limits):
                        mask = reached(b.add(place, b.mul(plane, const(c))), limit)
                        code = b.or_(code, b.select(mask, fill(I32, lanes, 1 << c), fill(I32, lanes, 0)))
                    return b.trunc(code, ir.VectorType(I8, words.count))

                every(looked_up)


# The other operations.


def fill_floats(b: Builder, isa: Isa, *, address: Value, value: Value, count: Value) -> None:
    """At least ``count`` times one float, in whole vectors."""
    values = splat(b, value, isa.lanes)

    def body(turn: Value, _: list[Value]) -> list[Value]:
        store(b, values, at(b, address, turn, isa.width))
        return []

    loop(b, b.udiv(b.add(count, const(isa.lanes - 1)), const(isa.lanes)), [], body)


def map_rows(b: Builder, isa: Isa, to: Rows, *, x: Value, scale: Value, shift: Value, slope: Value) -> None:
    """``prelu(x * scale + shift)`` plus residuals."""
    scales, shifts, slopes = (splat(b, value, isa.lanes) for value in (scale, shift, slope))

    def row(number: Value) -> Callable[[Value], Value]:
        begin = at(b, x, b.mul(number, to.count), 4)

        def vector(first: Value) -> Value:
            floats = load(b, at(b, begin, first, 4), ir.VectorType(F32, isa.lanes))
            return prelu(b, b.fadd(b.fmul(floats, scales), shifts), slopes)

        return vector

    write_rows(b, isa, to, row)


def pool_rows(
    b: Builder,
    isa: Isa,
    maximum: bool,
    stride: int,
    to: Rows,
    *,
    x: Value,
    pitch: Value,
    height: Value,
    width: Value,
    rows: Value,
    columns: Value,
) -> None:
    """Maximum or average of windows over a padded plane, plus residuals.

    An average adds the pixels in the order of rows and columns and then divides, as torch does. What pads an average is
    zero, which changes no sum.

    Args:
        b: Where.
        isa: For which processor.
        maximum: Which.
        stride: From window to window, 1 or 2.
        to: Where the rows go.
        x: Address of the first window's first pixel.
        pitch: Bytes from row to row.
        height: Rows of a window.
        width: Pixels of a row of a window.
        rows: Address of float32 per row of windows: rows that an average counts.
        columns: Address of float32 per window of a row: columns that it counts.
    """
    lanes = isa.lanes
    floats = ir.VectorType(F32, lanes)

    def take(total: Value, place: Value) -> Value:
        pixel = _every(b, place, lanes, stride)
        if maximum:
            return b.select(b.fcmp_ordered(">", pixel, total), pixel, total)
        return b.fadd(total, pixel)

    def windows(kernel: int | None) -> None:
        def row(number: Value) -> Callable[[Value], Value]:
            begin = b.add(x, b.mul(b.mul(number, const(stride)), pitch))
            counted = splat(b, load(b, at(b, rows, number, 4), F32), lanes)

            def vector(first: Value) -> Value:
                corner = at(b, begin, first, 4 * stride)
                total = fill(F32, lanes, float("-inf") if maximum else 0.0)
                if kernel is None:

                    def line(i: Value, carried: list[Value]) -> list[Value]:
                        start = b.add(corner, b.mul(i, pitch))
                        return loop(b, width, carried, lambda j, had: [take(had[0], at(b, start, j, 4))])

                    (total,) = loop(b, height, [total], line)
                else:
                    for i in range(kernel):
                        start = b.add(corner, b.mul(pitch, const(i)))
                        for j in range(kernel):
                            total = take(total, b.add(start, const(4 * j)))
                if maximum:
                    return total
                return b.fdiv(total, b.fmul(load(b, at(b, columns, first, 4), floats), counted))

            return vector

        write_rows(b, isa, to, row)

    usual = 3
    is_usual = b.and_(b.icmp_signed("==", height, const(usual)), b.icmp_signed("==", width, const(usual)))
    with b.if_else(is_usual) as (unrolled, other):
        with unrolled:
            windows(usual)
        with other:
            windows(None)


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


# The most that a processor can do, for comparison.


def peak(b: Builder, isa: Isa, kind: Kind, turns: Value) -> Value:
    """Multiply and accumulate in registers alone, ``turns`` times :func:`peak_macs` bits; the int32 means nothing.

    What every step of a kernel must do at least: XOR, population count and addition, or table lookup and addition.
    Without an instruction that counts the bits of a word, the bits of bytes are counted and added as bytes.
    """
    ways = isa.registers // 2
    words = kind == "popcount" and isa.popcount
    vector = ir.VectorType(I32 if words else I8, isa.lanes if words else isa.width)
    start = [fill(vector.element, vector.count, way) for way in range(ways)]

    def body(turn: Value, carried: list[Value]) -> list[Value]:
        moving, *sums = carried
        new = []
        for way, total in enumerate(sums):
            # One of its own for each, or they would be computed once for all.
            other = fill(vector.element, vector.count, 7 * way + 1)
            if kind == "lookup":
                # The codes move: constant ones would make another shuffle of it.
                table = ir.Constant(vector, [vector.element(7 * way + byte % 16) for byte in range(vector.count)])
                step = _look_up(b, isa, table, moving)
            else:
                name = f"llvm.ctpop.v{vector.count}i{32 if words else 8}"
                step = call(b, name, vector, b.xor(moving, other))
            new.append(b.add(total, step))
        return [b.add(moving, fill(vector.element, vector.count, 3)), *new]

    _, *sums = loop(b, turns, [start[1], *start], body)
    result = sums[0]
    for other in sums[1:]:
        result = b.xor(result, other)
    return b.extract_element(b.bitcast(result, ir.VectorType(I32, isa.lanes)), const(0, I32))


def peak_macs(isa: Isa, kind: Kind) -> int:
    """Bits that one turn of :func:`peak` multiplies and accumulates."""
    return isa.registers // 2 * isa.width * (4 if kind == "lookup" else 8)
