"""Forward kernel of memory attention, and what it shares with the backward kernels.

A program takes one query head and a block of trunk rows, and goes through the keys that these rows see: the trunk's
keys up to the rows (only the blocks on the diagonal are masked), then the band of memory slots that the rows read. One
online softmax runs over all of it.

Head sizes need not be powers of two: a tile is split in columns into ``MAIN`` and ``TAIL`` (powers of two, the second
may be 0), so that 80 is computed as 64 + 16 and not as 128. Where ``TAIL`` is 0 the tail of a tile is its main part,
and is not used. Scores are in units of log2: ``scale2`` is log2(e) / sqrt(D).
"""

# Triton reads annotations of kernel arguments as their types.
# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""The interpreter multiplies the bits of bf16 numbers as integers, so products are of fp32 copies there."""


@triton.jit
def load_part(pointer, stride, rows, inside, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Columns ``FIRST`` to ``FIRST + WIDTH`` of some rows; 0 beyond ``D`` and in rows that are not inside."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = pointer + rows[:, None] * stride + columns[None, :]
    if FIRST + WIDTH > D:
        tile = tl.load(pointers, mask=inside[:, None] & (columns < D)[None, :], other=0.0)
    else:
        tile = tl.load(pointers, mask=inside[:, None], other=0.0)
    return tile


@triton.jit
def load_rows(pointer, stride, rows, inside, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Some rows of a tensor, as main and tail columns; rows that are not inside are not read."""
    main = load_part(pointer, stride, rows, inside, D, 0, MAIN)
    tail = main
    if TAIL > 0:
        tail = load_part(pointer, stride, rows, inside, D, MAIN, TAIL)
    return main, tail


@triton.jit
def store_part(pointer, stride, rows, limit, tile, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Write columns ``FIRST`` to ``FIRST + WIDTH`` of the rows below ``limit``."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = pointer + rows[:, None] * stride + columns[None, :]
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=(rows < limit)[:, None] & (columns < D)[None, :])


@triton.jit
def store_rows(pointer, stride, rows, limit, main, tail, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Write the rows below ``limit``."""
    store_part(pointer, stride, rows, limit, main, D, 0, MAIN)
    if TAIL > 0:
        store_part(pointer, stride, rows, limit, tail, D, MAIN, TAIL)


@triton.jit
def dot(left, right, total):
    """``left @ right + total`` in fp32."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def product(left_main, left_tail, right_main, right_tail, TAIL: tl.constexpr):
    """Rows of the left times rows of the right: ``left @ right.T`` in fp32."""
    result = tl.zeros((left_main.shape[0], right_main.shape[0]), tl.float32)
    result = dot(left_main, tl.trans(right_main), result)
    if TAIL > 0:
        result = dot(left_tail, tl.trans(right_tail), result)
    return result


@triton.jit
def accumulate(sum_main, sum_tail, weights, main, tail, TAIL: tl.constexpr):
    """``sum + weights @ rows``, the weights in the dtype of the rows."""
    weights = weights.to(main.dtype)
    sum_main = dot(weights, main, sum_main)
    if TAIL > 0:
        sum_tail = dot(weights, tail, sum_tail)
    return sum_main, sum_tail


@triton.jit
def chunk_of(rows, prefix, chunk_length, chunks):
    """The chunk that trunk rows belong to; rows of the prefix count as the first context row."""
    return tl.minimum(tl.maximum(rows - prefix, 0) // chunk_length, chunks - 1)


@triton.jit
def band_of_rows(rows, prefix, chunk_length, chunks, window, slots):
    """First slot that rows read, and the first that they no longer read; nothing for rows of the prefix."""
    chunk = chunk_of(rows, prefix, chunk_length, chunks)
    return (chunk - window + 1) * slots, tl.where(rows < prefix, 0, (chunk + 1) * slots)


@triton.jit
def band_of_block(first, last, prefix, chunk_length, chunks, window, slots):
    """The slots that any of the rows ``first`` to ``last`` reads, as their first and the one after their last."""
    low = (chunk_of(first, prefix, chunk_length, chunks) - window + 1) * slots
    high = (chunk_of(last, prefix, chunk_length, chunks) + 1) * slots
    return tl.maximum(low, 0), tl.where(last < prefix, 0, high)


@triton.jit
def load_valid(valid, stride, slots, limit):
    """Which memory slots hold something, of those below ``limit``; what the others hold is never read."""
    return tl.load(valid + slots * stride, mask=slots < limit, other=0) != 0


@triton.jit
def softmax_step(score, scale2, value_main, value_tail, out_main, out_tail, most, total, TAIL: tl.constexpr):
    """Take one more block of keys into the online softmax; every row has seen a key by then, or sees one here."""
    new_most = tl.maximum(most, tl.max(score, 1) * scale2)
    weight = tl.exp2(score * scale2 - new_most[:, None])
    shrink = tl.exp2(most - new_most)
    total = total * shrink + tl.sum(weight, 1)
    out_main = out_main * shrink[:, None]
    out_tail = out_tail * shrink[:, None]
    out_main, out_tail = accumulate(out_main, out_tail, weight, value_main, value_tail, TAIL)
    return out_main, out_tail, new_most, total


@triton.jit
def forward_kernel(
    query, key, value, memory_key, memory_value, valid, out, lse,
    query_strides, key_strides, value_strides, memory_key_strides, memory_value_strides, valid_strides, out_strides,
    T, heads, prefix, chunk_length, chunks, window, slots, scale2,
    REPEAT: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, MEMORY: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SLOTS: tl.constexpr,
):
    """Output ``[B, T, H, D]`` and log-sum-exp (base 2) ``[B, H, T]`` of ``ROWS`` queries of one head.

    Strides are of batch, row and head. The last rows, which see most keys, come first.
    """
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    group = head // REPEAT
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    rows = first + tl.arange(0, ROWS)
    key += batch * key_strides[0] + group * key_strides[2]
    value += batch * value_strides[0] + group * value_strides[2]
    query += batch * query_strides[0] + head * query_strides[2]
    q_main, q_tail = load_rows(query, query_strides[1], rows, rows < T, D, MAIN, TAIL)
    out_main = tl.zeros((ROWS, MAIN), tl.float32)
    out_tail = tl.zeros((ROWS, TAIL if TAIL > 0 else 1), tl.float32)
    most = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, tl.minimum(first + ROWS, T), KEYS):
        keys = start + tl.arange(0, KEYS)
        k_main, k_tail = load_rows(key, key_strides[1], keys, keys < T, D, MAIN, TAIL)
        score = product(q_main, q_tail, k_main, k_tail, TAIL)
        if start + KEYS > first:
            score = tl.where(keys[None, :] <= rows[:, None], score, -float("inf"))
        v_main, v_tail = load_rows(value, value_strides[1], keys, keys < T, D, MAIN, TAIL)
        out_main, out_tail, most, total = softmax_step(
            score, scale2, v_main, v_tail, out_main, out_tail, most, total, TAIL)
    if MEMORY:
        memory_key += batch * memory_key_strides[0] + group * memory_key_strides[2]
        memory_value += batch * memory_value_strides[0] + group * memory_value_strides[2]
        valid += batch * valid_strides[0] + group * valid_strides[2]
        low, high = band_of_rows(rows, prefix, chunk_length, chunks, window, slots)
        last = tl.minimum(first + ROWS, T) - 1
        from_slot, to_slot = band_of_block(first, last, prefix, chunk_length, chunks, window, slots)
        for start in tl.range(from_slot, to_slot, SLOTS, num_stages=1):
            keys = start + tl.arange(0, SLOTS)
            full = load_valid(valid, valid_strides[1], keys, to_slot)
            k_main, k_tail = load_rows(memory_key, memory_key_strides[1], keys, full, D, MAIN, TAIL)
            score = product(q_main, q_tail, k_main, k_tail, TAIL)
            seen = (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None]) & full[None, :]
            score = tl.where(seen, score, -float("inf"))
            v_main, v_tail = load_rows(memory_value, memory_value_strides[1], keys, full, D, MAIN, TAIL)
            out_main, out_tail, most, total = softmax_step(
                score, scale2, v_main, v_tail, out_main, out_tail, most, total, TAIL)
    out += batch * out_strides[0] + head * out_strides[2]
    store_rows(out, out_strides[1], rows, T, out_main / total[:, None], out_tail / total[:, None], D, MAIN, TAIL)
    lse += (batch * heads + head) * T
    tl.store(lse + rows, most + tl.log2(total), mask=rows < T)
