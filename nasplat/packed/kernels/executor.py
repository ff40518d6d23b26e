"""Runs a table of operations: the loops around the vector code, compiled by Numba.

Addresses are trusted here: they come from :mod:`nasplat.packed.plan`, which makes every offset itself, from a program
whose shapes were checked.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from nasplat.packed.kernels import emit
from nasplat.packed.kernels import fields as f
from nasplat.packed.kernels import intrinsics as k

_PACK, _CONV, _POOL, _MAP, _LINEAR, _MEAN, _ARGMAX = (int(code) for code in f.Opcode)

_WIDTH = k.ISA.width
_LANES = k.ISA.lanes
_LOOKUP, _POPCOUNT = 0, 1
_PADDING = emit.PADDING["lookup"]

_V1, _V2, _V3, _V4 = (k.tile_vectors(k.ISA, "lookup", q) for q in (1, 2, 3, 4))
_P1, _P2, _P3, _P4 = (k.tile_vectors(k.ISA, "popcount", q) for q in (1, 2, 3, 4))
_R1, _R2, _R3, _R4 = (k.tile_vectors(k.ISA, "real", q) for q in (1, 2, 3, 4))

_inner: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


@njit(**_inner)
def _fill_padding(address, count, kind):
    """So many codes of padding."""
    if kind == _LOOKUP:
        k.fill_bytes(address, _PADDING, count)
    else:
        k.fill_bytes(address, 0, 4 * count)


@njit(**_inner)
def _pack(d, consts, arena):
    kind, stride, pitch = d[f.KIND], d[f.STRIDE], d[f.PITCH]
    size = 1 if kind == _LOOKUP else 4
    plane_in, row_in = d[f.HEIGHT] * d[f.WIDTH] * 4, d[f.WIDTH] * 4
    per_group = d[f.CHANNELS] // d[f.GROUPS]
    out = arena + d[f.OUT_AT]
    for group in range(d[f.GROUPS]):
        for plane in range(d[f.PLANES]):
            first = group * per_group + plane * d[f.PLANE_CHANNELS]
            channels = min(d[f.PLANE_CHANNELS], per_group - plane * d[f.PLANE_CHANNELS])
            thresholds = consts + d[f.THRESHOLD_AT] + 4 * first
            for number in range(d[f.PHASES]):
                phase = consts + d[f.PHASES_AT] + 32 * number
                top, left = k.load_int(phase), k.load_int(phase + 4)
                first_row, rows = k.load_int(phase + 8), k.load_int(phase + 12)
                real_rows, columns = k.load_int(phase + 16), k.load_int(phase + 20)
                lead, place = k.load_int(phase + 24), out + k.load_int(phase + 28)
                _fill_padding(place, lead, kind)
                place += lead * size
                above = min(rows, max(0, -first_row))
                _fill_padding(place, above * pitch, kind)
                place += above * pitch * size
                inside = max(0, min(rows - above, real_rows - max(0, first_row)))
                x = arena + d[f.X_AT] + first * plane_in + (max(0, first_row) * stride + top) * row_in + left * 4
                pitch_in, gap = stride * row_in, pitch - columns
                if stride == 1:
                    if kind == _LOOKUP:
                        k.pack_lookup(x, pitch_in, plane_in, thresholds, channels, inside, columns, place, gap)
                    elif kind == _POPCOUNT:
                        k.pack_popcount(x, pitch_in, plane_in, thresholds, channels, inside, columns, place, gap)
                    else:
                        k.pack_real(x, pitch_in, plane_in, thresholds, channels, inside, columns, place, gap)
                elif stride == 2:
                    if kind == _LOOKUP:
                        k.pack_lookup2(x, pitch_in, plane_in, thresholds, channels, inside, columns, place, gap)
                    elif kind == _POPCOUNT:
                        k.pack_popcount2(x, pitch_in, plane_in, thresholds, channels, inside, columns, place, gap)
                    else:
                        k.pack_real2(x, pitch_in, plane_in, thresholds, channels, inside, columns, place, gap)
                else:
                    for r in range(inside):
                        row = place + r * pitch * size
                        _pack_strided(kind, x + r * pitch_in, plane_in, thresholds, channels, columns, stride, row)
                        _fill_padding(row + columns * size, gap, kind)
                _fill_padding(place + inside * pitch * size, (rows - above - inside) * pitch, kind)
            out += d[f.PLANE_BYTES]


@njit(**_inner)
def _pack_strided(kind, row, plane_in, thresholds, channels, count, stride, out):
    for i in range(count):
        x = row + i * stride * 4
        if kind in (_LOOKUP, _POPCOUNT):
            code = 0
            for c in range(channels):
                if k.load_float(x + c * plane_in) >= k.load_float(thresholds + 4 * c):
                    code |= 1 << c
            if kind == _LOOKUP:
                k.store_byte(out + i, code)
            else:
                k.store_int(out + 4 * i, code)
        else:
            k.store_float(out + 4 * i, k.load_float(x))


@njit(**_inner)
def _lookup_sums(q, vectors, x, offsets, steps, chunk, weights, tables, out, stride):
    v = 0
    narrow = steps <= chunk
    size = 1 if narrow else 2
    most = _V4 if q == 4 else _V3 if q == 3 else _V2 if q == 2 else _V1
    while v < vectors:
        # A pair matters where an image is hardly larger than two vectors.
        many = most if vectors - v >= most else min(2, vectors - v)
        at, to = x + v * _WIDTH, out + v * _WIDTH * size
        for first in range(0, steps, chunk):
            o, n, w = offsets + 4 * first, min(chunk, steps - first), weights + first * q
            mode = emit.NARROW if narrow else emit.ADD if first > 0 else emit.OVERWRITE
            if many == most:
                if q == 4:
                    k.lookup_tile4(at, o, n, w, tables, to, stride, mode)
                elif q == 3:
                    k.lookup_tile3(at, o, n, w, tables, to, stride, mode)
                elif q == 2:
                    k.lookup_tile2(at, o, n, w, tables, to, stride, mode)
                else:
                    k.lookup_tile1(at, o, n, w, tables, to, stride, mode)
            elif many == 2:
                if q == 4:
                    k.lookup_pair4(at, o, n, w, tables, to, stride, mode)
                elif q == 3:
                    k.lookup_pair3(at, o, n, w, tables, to, stride, mode)
                elif q == 2:
                    k.lookup_pair2(at, o, n, w, tables, to, stride, mode)
                else:
                    k.lookup_pair1(at, o, n, w, tables, to, stride, mode)
            else:
                if q == 4:
                    k.lookup_tail4(at, o, n, w, tables, to, stride, mode)
                elif q == 3:
                    k.lookup_tail3(at, o, n, w, tables, to, stride, mode)
                elif q == 2:
                    k.lookup_tail2(at, o, n, w, tables, to, stride, mode)
                else:
                    k.lookup_tail1(at, o, n, w, tables, to, stride, mode)
        v += many


@njit(**_inner)
def _popcount_sums(q, vectors, x, offsets, steps, weights, out, stride):
    v = 0
    many = _P4 if q == 4 else _P3 if q == 3 else _P2 if q == 2 else _P1
    while v < vectors:
        whole = vectors - v >= many
        at, to = x + v * _LANES * 4, out + v * _LANES * 4
        if whole:
            if q == 4:
                k.popcount_tile4(at, offsets, steps, weights, 0, to, stride, 0)
            elif q == 3:
                k.popcount_tile3(at, offsets, steps, weights, 0, to, stride, 0)
            elif q == 2:
                k.popcount_tile2(at, offsets, steps, weights, 0, to, stride, 0)
            else:
                k.popcount_tile1(at, offsets, steps, weights, 0, to, stride, 0)
        else:
            if q == 4:
                k.popcount_tail4(at, offsets, steps, weights, 0, to, stride, 0)
            elif q == 3:
                k.popcount_tail3(at, offsets, steps, weights, 0, to, stride, 0)
            elif q == 2:
                k.popcount_tail2(at, offsets, steps, weights, 0, to, stride, 0)
            else:
                k.popcount_tail1(at, offsets, steps, weights, 0, to, stride, 0)
        v += many if whole else 1


@njit(**_inner)
def _real_sums(q, vectors, x, offsets, steps, weights, out, stride):
    v = 0
    many = _R4 if q == 4 else _R3 if q == 3 else _R2 if q == 2 else _R1
    while v < vectors:
        whole = vectors - v >= many
        at, to = x + v * _LANES * 4, out + v * _LANES * 4
        if whole:
            if q == 4:
                k.real_tile4(at, offsets, steps, weights, 0, to, stride, 0)
            elif q == 3:
                k.real_tile3(at, offsets, steps, weights, 0, to, stride, 0)
            elif q == 2:
                k.real_tile2(at, offsets, steps, weights, 0, to, stride, 0)
            else:
                k.real_tile1(at, offsets, steps, weights, 0, to, stride, 0)
        else:
            if q == 4:
                k.real_tail4(at, offsets, steps, weights, 0, to, stride, 0)
            elif q == 3:
                k.real_tail3(at, offsets, steps, weights, 0, to, stride, 0)
            elif q == 2:
                k.real_tail2(at, offsets, steps, weights, 0, to, stride, 0)
            else:
                k.real_tail1(at, offsets, steps, weights, 0, to, stride, 0)
        v += many if whole else 1


@njit(**_inner)
def _conv(d, consts, arena):
    kind, pitch, width, height = d[f.KIND], d[f.PITCH], d[f.OUT_WIDTH], d[f.OUT_HEIGHT]
    lanes = _WIDTH if kind == _LOOKUP else _LANES
    sums, stride, steps = arena + d[f.SUMS_AT], d[f.SUMS_STRIDE], d[f.STEPS]
    offsets, chunk, tables = consts + d[f.OFFSETS_AT], d[f.CHUNK], consts + d[f.TABLES_AT]
    size = 1 if kind == _LOOKUP else 4
    sum_pitch = pitch * (4 if kind != _LOOKUP else 1 if steps <= chunk else 2)
    pick = k.load_int(arena + d[f.PICK_AT]) if d[f.PICK_AT] >= 0 else 0
    all_weights = consts + d[f.WEIGHT_AT] + pick * d[f.WEIGHT_STRIDE]
    has_base = d[f.BASE_AT] >= 0
    bases = consts + d[f.BASE_AT] + pick * d[f.BASE_STRIDE]
    plane_out = height * width * 4
    added, constant = d[f.RESIDUALS], d[f.CONSTANT]
    for y in range(0, height, d[f.STRIP]):
        rows = min(d[f.STRIP], height - y)
        vectors = ((rows - 1) * pitch + width + lanes - 1) // lanes
        # Without a gap between the rows, they are one.
        lines, count = rows, width
        if pitch == width and not has_base:
            lines, count = 1, rows * width
        base_of = consts + d[f.BASE_CLASSES_AT] + 4 * y
        for number in range(d[f.BLOCKS]):
            block = consts + d[f.BLOCKS_AT] + 16 * number
            group, first, q = k.load_int(block), k.load_int(block + 4), k.load_int(block + 8)
            weights = all_weights + k.load_int(block + 12)
            x = arena + d[f.X_AT] + group * d[f.PLANES] * d[f.PLANE_BYTES] + y * pitch * size
            if kind == _LOOKUP:
                _lookup_sums(q, vectors, x, offsets, steps, chunk, weights, tables, sums, stride)
            elif kind == _POPCOUNT:
                _popcount_sums(q, vectors, x, offsets, steps, weights, sums, stride)
            else:
                _real_sums(q, vectors, x, offsets, steps, weights, sums, stride)
            for channel in range(first, first + q):
                row = sums + (channel - first) * stride
                scale = k.load_float(consts + d[f.SCALE_AT] + 4 * channel)
                shift = k.load_float(consts + d[f.SHIFT_AT] + 4 * channel)
                slope = k.load_float(consts + d[f.SLOPE_AT] + 4 * channel)
                factor = np.float32(1)
                if d[f.FACTOR_AT] >= 0:
                    factor = k.load_float(arena + d[f.FACTOR_AT] + 4 * channel)
                base = bases + channel * d[f.BASE_ROWS] * width * 4 if has_base else 0
                to = k.load_int(consts + d[f.CHANNEL_TO_AT] + 4 * channel) * plane_out + y * width * 4
                out, one, two = arena + d[f.OUT_AT] + to, arena + d[f.RESIDUAL1_AT] + to, arena + d[f.RESIDUAL2_AT] + to
                _conv_rows(
                    kind,
                    steps <= chunk,
                    lines,
                    count,
                    out,
                    one,
                    two,
                    added,
                    row,
                    sum_pitch,
                    base,
                    base_of,
                    constant,
                    scale,
                    shift,
                    slope,
                    factor,
                )


@njit(**_inner)
def _conv_rows(
    kind, narrow, rows, count, out, one, two, added, sums, pitch, base, base_of, constant, scale, shift, slope, factor
):
    if kind == _LOOKUP:
        if narrow:
            k.byte_rows(rows, count, out, one, two, added, sums, pitch, 0, 0, 0, scale, shift, slope, factor)
        else:
            k.short_rows(rows, count, out, one, two, added, sums, pitch, 0, 0, 0, scale, shift, slope, factor)
    elif kind == _POPCOUNT:
        k.word_rows(
            rows, count, out, one, two, added, sums, pitch, base, base_of, constant, scale, shift, slope, factor
        )
    else:
        k.real_rows(rows, count, out, one, two, added, sums, pitch, 0, 0, 0, scale, shift, slope, factor)


@njit(**_inner)
def _pool(d, consts, arena):
    height, width, out_height, out_width = d[f.HEIGHT], d[f.WIDTH], d[f.OUT_HEIGHT], d[f.OUT_WIDTH]
    stride, top, left, pitch = d[f.STRIDE], d[f.PAD_TOP], d[f.PAD_LEFT], d[f.PITCH]
    tall, wide, added = d[f.KERNEL_HEIGHT], d[f.KERNEL_WIDTH], d[f.RESIDUALS]
    padded, maximum = arena + d[f.SUMS_AT], d[f.MODE] != 0
    rows, columns = consts + d[f.ROWS_AT], consts + d[f.COLUMNS_AT]
    # All of a padded plane but what is copied into it stays as it is from channel to channel.
    nothing = np.float32(-np.inf) if maximum else np.float32(0)
    k.fill_floats(padded, nothing, d[f.PADDED_HEIGHT] * pitch)
    for channel in range(d[f.CHANNELS]):
        x = arena + d[f.X_AT] + channel * height * width * 4
        for r in range(min(height, d[f.PADDED_HEIGHT] - top)):
            k.copy_bytes(padded + ((r + top) * pitch + left) * 4, x + r * width * 4, min(width, pitch - left) * 4)
        to = channel * out_height * out_width * 4
        out, one, two = arena + d[f.OUT_AT] + to, arena + d[f.RESIDUAL1_AT] + to, arena + d[f.RESIDUAL2_AT] + to
        if stride == 1:
            if maximum:
                k.max_rows(out_height, out_width, out, one, two, added, padded, pitch * 4, tall, wide, rows, columns)
            else:
                k.average_rows(
                    out_height, out_width, out, one, two, added, padded, pitch * 4, tall, wide, rows, columns
                )
        elif stride == 2:
            if maximum:
                k.max_rows2(out_height, out_width, out, one, two, added, padded, pitch * 4, tall, wide, rows, columns)
            else:
                k.average_rows2(
                    out_height, out_width, out, one, two, added, padded, pitch * 4, tall, wide, rows, columns
                )
        else:
            for y in range(out_height):
                for i in range(out_width):
                    value = nothing
                    for u in range(tall):
                        for v in range(wide):
                            pixel = k.load_float(padded + ((y * stride + u) * pitch + i * stride + v) * 4)
                            if maximum:
                                value = pixel if pixel > value else value
                            else:
                                value += pixel
                    if not maximum:
                        value /= k.load_float(rows + 4 * y) * k.load_float(columns + 4 * i)
                    at = 4 * (y * out_width + i)
                    if added > 0:
                        value += k.load_float(one + at)
                    if added > 1:
                        value += k.load_float(two + at)
                    k.store_float(out + at, value)


@njit(**_inner)
def _map(d, consts, arena):
    count = d[f.HEIGHT] * d[f.WIDTH]
    for channel in range(d[f.CHANNELS]):
        scale = k.load_float(consts + d[f.SCALE_AT] + 4 * channel)
        shift = k.load_float(consts + d[f.SHIFT_AT] + 4 * channel)
        slope = k.load_float(consts + d[f.SLOPE_AT] + 4 * channel)
        place = k.load_int(consts + d[f.CHANNEL_TO_AT] + 4 * channel) * count * 4
        x, out = arena + d[f.X_AT] + channel * count * 4, arena + d[f.OUT_AT] + place
        one, two = arena + d[f.RESIDUAL1_AT] + place, arena + d[f.RESIDUAL2_AT] + place
        k.map_rows(1, count, out, one, two, d[f.RESIDUALS], x, scale, shift, slope)


@njit(**_inner)
def _linear(d, consts, arena):
    x, out = arena + d[f.X_AT], arena + d[f.OUT_AT]
    for channel in range(d[f.OUT_CHANNELS]):
        y = k.dot(consts + d[f.WEIGHT_AT] + channel * d[f.CHANNELS] * 4, x, d[f.CHANNELS])
        y += k.load_float(consts + d[f.SHIFT_AT] + 4 * channel)
        if d[f.MODE] == 1:
            y = y if y > 0 else np.float32(0)
        elif d[f.MODE] == 2:
            y = np.float32(1) / (np.float32(1) + np.float32(math.exp(-y)))
        k.store_float(out + 4 * channel, y)


@njit(**_inner)
def _mean(d, arena):
    count = d[f.HEIGHT] * d[f.WIDTH]
    for channel in range(d[f.CHANNELS]):
        value = k.total(arena + d[f.X_AT] + channel * count * 4, count) / np.float32(count)
        k.store_float(arena + d[f.OUT_AT] + 4 * channel, value)


@njit(**_inner)
def _argmax(d, arena):
    best = 0
    for channel in range(1, d[f.CHANNELS]):
        if k.load_float(arena + d[f.X_AT] + 4 * channel) > k.load_float(arena + d[f.X_AT] + 4 * best):
            best = channel
    k.store_int(arena + d[f.OUT_AT], best)


def compile_executor(fingerprint: str, cache: bool) -> Any:
    """The compiled executor.

    Args:
        fingerprint: Of all code that is compiled into it. Numba looks at this file alone when it decides whether a
            cached version is still good, and at the variables that a function closes over.
        cache: Whether to keep what is compiled, and to look for it.
    """

    @njit(
        "void(int64[:, ::1], int64, int64, int64, int64, int64, int64, "
        "float32[::1], int64, int64, float32[::1], int64, int64)",
        nogil=True,
        cache=cache,
        error_model="numpy",
    )
    def execute(table, first, last, turns, consts, arena, examples, x, x_bytes, x_at, y, y_bytes, y_at):
        """Rows ``first`` to ``last`` of the table, ``turns`` times over for each example; without ``y`` no result."""
        if len(fingerprint) == 0:
            return
        for example in range(examples):
            if x.size > 0:
                k.copy_bytes(arena + x_at, x.ctypes.data + example * x_bytes, x_bytes)
            for _ in range(turns):
                for row in range(first, last):
                    d = table[row]
                    op = d[f.OP]
                    if op == _PACK:
                        _pack(d, consts, arena)
                    elif op == _CONV:
                        _conv(d, consts, arena)
                    elif op == _POOL:
                        _pool(d, consts, arena)
                    elif op == _MAP:
                        _map(d, consts, arena)
                    elif op == _LINEAR:
                        _linear(d, consts, arena)
                    elif op == _MEAN:
                        _mean(d, arena)
                    elif op == _ARGMAX:
                        _argmax(d, arena)
            if y.size > 0:
                k.copy_bytes(y.ctypes.data + example * y_bytes, arena + y_at, y_bytes)

    return execute


def compile_peak(fingerprint: str, cache: bool) -> Any:
    """The compiled loop that stays in registers; arguments as in :func:`compile_executor`."""

    @njit("int64(boolean, int64)", nogil=True, cache=cache)
    def peak(lookup, turns):
        """:func:`nasplat.packed.kernels.emit.peak` of one of two kinds."""
        if len(fingerprint) == 0:
            return 0
        return k.lookup_peak(turns) if lookup else k.popcount_peak(turns)

    return peak
