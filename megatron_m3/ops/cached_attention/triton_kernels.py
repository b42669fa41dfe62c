"""Attention of one new token to its cache in one pass over it, which more programs may share.

A program takes the query heads of one key-value head of one sequence and a part of the columns. The first part begins
with the new token, from registers, and stores its key and value. Each part leaves an online softmax's sums; the second
kernel joins them. What stands in device memory decides how far a sequence is read: all steps have the same launch.

Scores are in units of log2, as in ``memory_attention``.
"""

# Triton reads annotations of kernel arguments as their types.
# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from megatron_m3.ops.memory_attention.triton_forward import load_rows, product, softmax_step, store_rows

LOWEST = tl.constexpr(-1e30)
"""In place of -inf where nothing is read yet, so that differences stay numbers."""


@triton.jit
def turned_part(pointer, stride, rows, inside, cosine, sine, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Columns ``FIRST`` to ``FIRST + WIDTH`` of some rows, rotated; in the dtype that they are stored in."""
    columns = FIRST + tl.arange(0, WIDTH)
    partners = (columns + D // 2) % D
    shown = inside[:, None] & (columns < D)[None, :]
    number = tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=shown, other=0.0).to(tl.float32)
    partner = tl.load(pointer + rows[:, None] * stride + partners[None, :], mask=shown, other=0.0).to(tl.float32)
    turn = tl.load(cosine + columns, mask=columns < D, other=0.0)[None, :]
    swap = tl.load(sine + columns, mask=columns < D, other=0.0)[None, :]
    return (number * turn + partner * swap).to(pointer.dtype.element_ty)


@triton.jit
def turned_rows(pointer, stride, rows, inside, cosine, sine, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Some rows, rotated, as main and tail columns."""
    main = turned_part(pointer, stride, rows, inside, cosine, sine, D, 0, MAIN)
    tail = main
    if TAIL > 0:
        tail = turned_part(pointer, stride, rows, inside, cosine, sine, D, MAIN, TAIL)
    return main, tail


# compiled once more for every other width of a batch's mask, a server would stand still meanwhile
@triton.jit(do_not_specialize=["mask_stride"])
def attend_kernel(
    query, key, value, keys, values, cosine, sine, lengths, mask, hidden, out, most_of, total_of,
    query_strides, key_strides, value_strides, keys_strides, values_strides, table_stride, mask_stride,
    groups, prefix, slots, scale2,
    REPEAT: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
):
    """Output ``[B, H, D]`` or, of several ``PARTS``, sums ``[B, G, parts, R, D]`` with their most and total, in fp32.

    Strides are of sequence and head, in the cache also of column. ``HEADS`` says whether ``hidden`` is read.
    """
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence, group = pair // groups, pair % groups
    length = tl.load(lengths + sequence).to(tl.int32)
    rows = tl.arange(0, ROWS)
    cosine += sequence * table_stride
    sine += sequence * table_stride
    query += sequence * query_strides[0] + group * REPEAT * query_strides[1]
    keys += sequence * keys_strides[0] + group * keys_strides[1]
    values += sequence * values_strides[0] + group * values_strides[1]
    q_main, q_tail = turned_rows(query, query_strides[1], rows, rows < REPEAT, cosine, sine, D, MAIN, TAIL)
    out_main = tl.zeros((ROWS, MAIN), tl.float32)
    out_tail = tl.zeros((ROWS, TAIL if TAIL > 0 else 1), tl.float32)
    most = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    last = prefix + slots + length
    if part == 0:
        key += sequence * key_strides[0] + group * key_strides[1]
        value += sequence * value_strides[0] + group * value_strides[1]
        # the one key stands in every row, so that row by row is the product
        every = rows >= 0
        k_main, k_tail = turned_rows(key, 0, rows, every, cosine, sine, D, MAIN, TAIL)
        v_main, v_tail = load_rows(value, 0, rows, every, D, MAIN, TAIL)
        score = tl.sum(q_main.to(tl.float32) * k_main.to(tl.float32), 1)
        out_main += v_main.to(tl.float32)
        if TAIL > 0:
            score += tl.sum(q_tail.to(tl.float32) * k_tail.to(tl.float32), 1)
            out_tail += v_tail.to(tl.float32)
        store_rows(keys + last * keys_strides[2], 0, rows, 1, k_main, k_tail, D, MAIN, TAIL)
        store_rows(values + last * values_strides[2], 0, rows, 1, v_main, v_tail, D, MAIN, TAIL)
        most = score * scale2
        total += 1.0
    reads = slots
    if HEADS:
        reads = tl.where(tl.load(hidden + group) != 0, 0, slots)
    share = tl.cdiv(tl.cdiv(last, KEYS), PARTS) * KEYS
    for start in range(part * share, tl.minimum((part + 1) * share, last), KEYS):
        columns = start + tl.arange(0, KEYS)
        slot = columns - prefix
        is_slot = (slot >= 0) & (slot < slots)
        # a slot without a kept token is never read
        empty = tl.load(mask + sequence * mask_stride + slot, mask=is_slot & (slot < reads), other=-1.0) != 0
        shown = (columns < last) & ~(is_slot & empty)
        k_main, k_tail = load_rows(keys, keys_strides[2], columns, shown, D, MAIN, TAIL)
        score = tl.where(shown[None, :], product(q_main, q_tail, k_main, k_tail, TAIL), -float("inf"))
        v_main, v_tail = load_rows(values, values_strides[2], columns, shown, D, MAIN, TAIL)
        out_main, out_tail, most, total = softmax_step(
            score, scale2, v_main, v_tail, out_main, out_tail, most, total, TAIL)
    place = pair * PARTS + part
    if PARTS == 1:
        out_main = out_main / total[:, None]
        out_tail = out_tail / total[:, None]
    else:
        tl.store(most_of + place * REPEAT + rows, most, mask=rows < REPEAT)
        tl.store(total_of + place * REPEAT + rows, total, mask=rows < REPEAT)
    store_rows(out + place * REPEAT * D, D, rows, REPEAT, out_main, out_tail, D, MAIN, TAIL)


@triton.jit
def join_kernel(
    sums, most_of, total_of, out, REPEAT: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):
    """The output of one query head from the sums of its parts."""
    pair, row = tl.program_id(0).to(tl.int64) // REPEAT, tl.program_id(0) % REPEAT
    places = (pair * PARTS + tl.arange(0, PARTS)) * REPEAT + row
    columns = tl.arange(0, WIDTH)
    most = tl.load(most_of + places)
    weight = tl.exp2(most - tl.max(most, 0))
    total = tl.sum(weight * tl.load(total_of + places), 0)
    part = tl.load(sums + places[:, None] * D + columns[None, :], mask=(columns < D)[None, :], other=0.0)
    joined = tl.sum(part * weight[:, None], 0) / total
    tl.store(out + tl.program_id(0).to(tl.int64) * D + columns, joined.to(out.dtype.element_ty), mask=columns < D)
