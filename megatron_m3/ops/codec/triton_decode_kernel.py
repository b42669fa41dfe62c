"""Codes of a transform code to keys and values where attention reads them: a program for tokens of one class.

Values are looked up in tables of 18 KiB, which stay in a multiprocessor's first-level cache; nothing but the keys and
values is written. ``HALF`` is a power of two that holds half a head's numbers.
"""

# Triton reads annotations of kernel arguments as their types.
# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def look_up(stream, inside, fields, tables, STATE_BITS: tl.constexpr):
    """Table values [rows, numbers] of rows' streams; ``fields`` are bits up to and with a number's, times 16, and its
    own."""
    start = (fields >> 4) + 16 - STATE_BITS
    # the stream begins behind two bytes of zeros
    byte = (start >> 3) - 2
    pointers = stream[:, None] + byte[None, :]
    high = tl.load(pointers, mask=inside[:, None] & (byte >= 0)[None, :], other=0).to(tl.int32)
    low = tl.load(pointers + 1, mask=inside[:, None] & (byte >= -1)[None, :], other=0).to(tl.int32)
    state = (((high << 8) | low) >> (16 - STATE_BITS - (start & 7))[None, :]) & ((1 << STATE_BITS) - 1)
    return tl.load(tables + ((fields & 15) << STATE_BITS)[None, :] + state)


@triton.jit
def load_half(pointer, rows, stride, columns, D: tl.constexpr):
    """The columns below D / 2 of some rows, 0 beyond."""
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=(columns < D // 2)[None, :], other=0.0)


@triton.jit
def store_half(pointers, columns, tile, inside, D: tl.constexpr):
    """Write the columns below D / 2 of the rows that are inside."""
    mask = inside[:, None] & (columns < D // 2)[None, :]
    tl.store(pointers[:, None] + columns[None, :], tile.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def decode_kernel(
    codes, positions, num_kept, placements, out, classes, fields, matrices, means, tables, cosines, sines,
    code_stride, position_strides, out_strides, tokens, numbers, num_positions,
    K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STATE_BITS: tl.constexpr,
):
    """``ROWS`` tokens of a class into ``out``, whose strides are of layer, part, sequence, head and slot.

    ``classes`` [C, 5] say layer, head, bytes of a token's codes of heads before, of this one, and how many of the
    ``numbers`` have bits. ``tokens`` are K of each of the ``placements``.
    """
    kind = tl.program_id(1)
    layer, head = tl.load(classes + 5 * kind).to(tl.int64), tl.load(classes + 5 * kind + 1).to(tl.int64)
    first_byte, code_bytes = tl.load(classes + 5 * kind + 2), tl.load(classes + 5 * kind + 3)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = token < tokens
    place, slot = placements + token // K * 3, token % K
    row = tl.load(place, mask=inside, other=0).to(tl.int64)
    is_kept = inside & (slot < tl.load(num_kept + row, mask=inside, other=0))
    stream = codes + row * code_stride + first_byte * K + slot * code_bytes
    columns = tl.arange(0, HALF)
    zeros = tl.zeros((ROWS, 1), tl.float32)
    means += kind * 2 * D + columns
    key0 = zeros + tl.load(means, mask=columns < D // 2, other=0.0)[None, :]
    key1 = zeros + tl.load(means + D // 2, mask=columns < D // 2, other=0.0)[None, :]
    value0 = zeros + tl.load(means + D, mask=columns < D // 2, other=0.0)[None, :]
    value1 = zeros + tl.load(means + D + D // 2, mask=columns < D // 2, other=0.0)[None, :]
    matrices += kind.to(tl.int64) * numbers * 2 * D
    for start in range(0, tl.load(classes + 5 * kind + 4), BLOCK):
        number = start + tl.arange(0, BLOCK)
        found = look_up(stream, is_kept, tl.load(fields + kind * numbers + number), tables, STATE_BITS)
        key0 = tl.dot(found, load_half(matrices, number, 2 * D, columns, D), key0, input_precision="ieee")
        key1 = tl.dot(found, load_half(matrices + D // 2, number, 2 * D, columns, D), key1, input_precision="ieee")
        value0 = tl.dot(found, load_half(matrices + D, number, 2 * D, columns, D), value0, input_precision="ieee")
        value1 = tl.dot(
            found, load_half(matrices + D + D // 2, number, 2 * D, columns, D), value1, input_precision="ieee")
    position = tl.load(positions + row * position_strides[0] + kind * position_strides[1] + slot, mask=is_kept, other=0)
    angle = tl.minimum(position.to(tl.int32), num_positions - 1)
    cosine, sine = load_half(cosines, angle, D // 2, columns, D), load_half(sines, angle, D // 2, columns, D)
    sequence = tl.load(place + 1, mask=inside, other=0).to(tl.int64)
    to_slot = tl.load(place + 2, mask=inside, other=0) + slot
    keys = out + layer * out_strides[0] + head * out_strides[3] + sequence * out_strides[2] + to_slot * out_strides[4]
    values = keys + out_strides[1]
    full = is_kept[:, None]
    store_half(keys, columns, tl.where(full, key0 * cosine - key1 * sine, 0.0), inside, D)
    store_half(keys + D // 2, columns, tl.where(full, key1 * cosine + key0 * sine, 0.0), inside, D)
    store_half(values, columns, tl.where(full, value0, 0.0), inside, D)
    store_half(values + D // 2, columns, tl.where(full, value1, 0.0), inside, D)
