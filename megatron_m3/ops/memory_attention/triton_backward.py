"""Backward kernels of memory attention: no atomics, so that gradients are the same in every run.

Both recompute the weights from the joint log-sum-exp. One goes from a block of queries through the keys that it sees;
the other from a block of keys, of the trunk or of the memory, through the queries that see it, of all query heads that
share the key-value head. With ``dots`` the sum of output times its gradient in each row, the gradient of a score is
``weight * (grad . value - dots)``.
"""

# Triton reads annotations of kernel arguments as their types.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from megatron_m3.ops.memory_attention.triton_forward import (
    INTERPRETED,
    accumulate,
    band_of_block,
    band_of_rows,
    forward_kernel,
    load_rows,
    load_valid,
    product,
    store_rows,
)

__all__ = ["INTERPRETED", "forward_kernel", "key_gradient_kernel", "query_gradient_kernel"]


@triton.jit
def query_step(q_main, q_tail, grad_main, grad_tail, lse, dots, k_main, k_tail, v_main, v_tail, seen, masked,
               scale2, sum_main, sum_tail, TAIL: tl.constexpr):
    """Add what one block of keys gives to the gradient of the queries, but for the scale."""
    score = product(q_main, q_tail, k_main, k_tail, TAIL)
    weight = tl.exp2(score * scale2 - lse[:, None])
    if masked:
        weight = tl.where(seen, weight, 0.0)
    d_weight = product(grad_main, grad_tail, v_main, v_tail, TAIL)
    d_score = weight * (d_weight - dots[:, None])
    return accumulate(sum_main, sum_tail, d_score, k_main, k_tail, TAIL)


@triton.jit
def query_gradient_kernel(
    query, key, value, memory_key, memory_value, valid, out, grad, lse, dots, d_query,
    query_strides, key_strides, value_strides, memory_key_strides, memory_value_strides, valid_strides, out_strides,
    grad_strides, d_query_strides,
    T, heads, prefix, chunk_length, chunks, window, slots, scale2, scale,
    REPEAT: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, MEMORY: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SLOTS: tl.constexpr,
):
    """Gradient of ``ROWS`` queries of one head, and their ``dots`` ``[B, H, T]``, which the other kernel needs."""
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    group = head // REPEAT
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    rows = first + tl.arange(0, ROWS)
    inside = rows < T
    key += batch * key_strides[0] + group * key_strides[2]
    value += batch * value_strides[0] + group * value_strides[2]
    out += batch * out_strides[0] + head * out_strides[2]
    grad += batch * grad_strides[0] + head * grad_strides[2]
    query += batch * query_strides[0] + head * query_strides[2]
    grad_main, grad_tail = load_rows(grad, grad_strides[1], rows, inside, D, MAIN, TAIL)
    out_main, out_tail = load_rows(out, out_strides[1], rows, inside, D, MAIN, TAIL)
    row_dots = tl.sum(grad_main.to(tl.float32) * out_main.to(tl.float32), 1)
    if TAIL > 0:
        row_dots += tl.sum(grad_tail.to(tl.float32) * out_tail.to(tl.float32), 1)
    tl.store(dots + (batch * heads + head) * T + rows, row_dots, mask=inside)
    row_lse = tl.load(lse + (batch * heads + head) * T + rows, mask=inside, other=float("inf"))
    q_main, q_tail = load_rows(query, query_strides[1], rows, inside, D, MAIN, TAIL)
    sum_main = tl.zeros((ROWS, MAIN), tl.float32)
    sum_tail = tl.zeros((ROWS, TAIL if TAIL > 0 else 1), tl.float32)
    for start in range(0, tl.minimum(first + ROWS, T), KEYS):
        keys = start + tl.arange(0, KEYS)
        k_main, k_tail = load_rows(key, key_strides[1], keys, keys < T, D, MAIN, TAIL)
        v_main, v_tail = load_rows(value, value_strides[1], keys, keys < T, D, MAIN, TAIL)
        sum_main, sum_tail = query_step(
            q_main, q_tail, grad_main, grad_tail, row_lse, row_dots, k_main, k_tail, v_main, v_tail,
            keys[None, :] <= rows[:, None], start + KEYS > first, scale2, sum_main, sum_tail, TAIL)
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
            v_main, v_tail = load_rows(memory_value, memory_value_strides[1], keys, full, D, MAIN, TAIL)
            seen = (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None]) & full[None, :]
            sum_main, sum_tail = query_step(
                q_main, q_tail, grad_main, grad_tail, row_lse, row_dots, k_main, k_tail, v_main, v_tail, seen, True,
                scale2, sum_main, sum_tail, TAIL)
    d_query += batch * d_query_strides[0] + head * d_query_strides[2]
    store_rows(d_query, d_query_strides[1], rows, T, sum_main * scale, sum_tail * scale, D, MAIN, TAIL)


@triton.jit
def key_step(query, grad, lse, dots, query_stride, grad_stride, rows, T, k_main, k_tail, v_main, v_tail, seen, masked,
             scale2, dk_main, dk_tail, dv_main, dv_tail, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Add what one block of queries gives to the gradients of keys (but for the scale) and values.

    ``seen`` is ``[keys, rows]``, like everything here: the products then need no transposed operand from registers.
    """
    inside = rows < T
    q_main, q_tail = load_rows(query, query_stride, rows, inside, D, MAIN, TAIL)
    score = product(k_main, k_tail, q_main, q_tail, TAIL)
    row_lse = tl.load(lse + rows, mask=inside, other=float("inf"))
    weight = tl.exp2(score * scale2 - row_lse[None, :])
    if masked:
        weight = tl.where(seen, weight, 0.0)
    grad_main, grad_tail = load_rows(grad, grad_stride, rows, inside, D, MAIN, TAIL)
    dv_main, dv_tail = accumulate(dv_main, dv_tail, weight, grad_main, grad_tail, TAIL)
    row_dots = tl.load(dots + rows, mask=inside, other=0.0)
    d_weight = product(v_main, v_tail, grad_main, grad_tail, TAIL)
    d_score = weight * (d_weight - row_dots[None, :])
    dk_main, dk_tail = accumulate(dk_main, dk_tail, d_score, q_main, q_tail, TAIL)
    return dk_main, dk_tail, dv_main, dv_tail


@triton.jit
def key_gradients(
    query, key, value, grad, lse, dots, d_key, d_value,
    query_stride, query_head_stride, key_stride, value_stride, grad_stride, grad_head_stride, d_key_stride,
    d_value_stride, keys, full, num_keys, begin, masked_end, end, T,
    prefix, chunk_length, chunks, window, slots, scale2, scale,
    EACH: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, MEMORY: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """Gradients of a block of keys and values, of the trunk or of the memory, from ``EACH`` query heads.

    Rows ``begin`` to ``end`` are those that may see them; every row from ``masked_end`` on sees all of them.
    """
    k_main, k_tail = load_rows(key, key_stride, keys, full, D, MAIN, TAIL)
    v_main, v_tail = load_rows(value, value_stride, keys, full, D, MAIN, TAIL)
    dk_main = tl.zeros((KEYS, MAIN), tl.float32)
    dv_main = tl.zeros((KEYS, MAIN), tl.float32)
    dk_tail = tl.zeros((KEYS, TAIL if TAIL > 0 else 1), tl.float32)
    dv_tail = tl.zeros((KEYS, TAIL if TAIL > 0 else 1), tl.float32)
    steps = tl.cdiv(end - begin, ROWS)
    for step in tl.range(0, EACH * steps, num_stages=1 if MEMORY else None):
        head = step // steps
        start = begin + (step - head * steps) * ROWS
        rows = start + tl.arange(0, ROWS)
        if MEMORY:
            low, high = band_of_rows(rows, prefix, chunk_length, chunks, window, slots)
            seen = (keys[:, None] >= low[None, :]) & (keys[:, None] < high[None, :]) & full[:, None]
        else:
            seen = keys[:, None] <= rows[None, :]
        dk_main, dk_tail, dv_main, dv_tail = key_step(
            query + head * query_head_stride, grad + head * grad_head_stride, lse + head * T, dots + head * T,
            query_stride, grad_stride, rows, T, k_main, k_tail, v_main, v_tail,
            seen, start < masked_end, scale2, dk_main, dk_tail, dv_main, dv_tail, D, MAIN, TAIL)
    store_rows(d_key, d_key_stride, keys, num_keys, dk_main * scale, dk_tail * scale, D, MAIN, TAIL)
    store_rows(d_value, d_value_stride, keys, num_keys, dv_main, dv_tail, D, MAIN, TAIL)


@triton.jit
def key_gradient_kernel(
    query, key, value, memory_key, memory_value, valid, grad, lse, dots,
    d_key, d_value, d_memory_key, d_memory_value,
    query_strides, key_strides, value_strides, memory_key_strides, memory_value_strides, valid_strides, grad_strides,
    d_key_strides, d_value_strides, d_memory_key_strides, d_memory_value_strides,
    T, heads, prefix, chunk_length, chunks, window, slots, scale2, scale,
    REPEAT: tl.constexpr, EACH: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    MEMORY: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SLOTS: tl.constexpr,
):
    """Gradients of ``KEYS`` keys and values of the trunk, or of ``SLOTS`` of the memory (the programs that come last).

    They are of the ``EACH`` query heads of one program alone: ``[B, T, H / EACH, D]``.
    """
    parts = heads // EACH
    batch = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    head = part * EACH
    group = head // REPEAT
    block = tl.program_id(1)
    key_blocks = tl.cdiv(T, KEYS)
    query += batch * query_strides[0] + head * query_strides[2]
    grad += batch * grad_strides[0] + head * grad_strides[2]
    lse += (batch * heads + head) * T
    dots += (batch * heads + head) * T
    if block < key_blocks:
        first = block * KEYS
        keys = first + tl.arange(0, KEYS)
        key_gradients(
            query, key + batch * key_strides[0] + group * key_strides[2],
            value + batch * value_strides[0] + group * value_strides[2], grad, lse, dots,
            d_key + batch * d_key_strides[0] + part * d_key_strides[2],
            d_value + batch * d_value_strides[0] + part * d_value_strides[2],
            query_strides[1], query_strides[2], key_strides[1], value_strides[1], grad_strides[1], grad_strides[2],
            d_key_strides[1], d_value_strides[1], keys, keys < T, T, first, tl.minimum(first + KEYS, T), T, T,
            prefix, chunk_length, chunks, window, slots, scale2, scale,
            EACH, D, MAIN, TAIL, False, ROWS, KEYS)
    elif MEMORY:
        first = (block - key_blocks) * SLOTS
        places = first + tl.arange(0, SLOTS)
        last = tl.minimum(first + SLOTS, chunks * slots) - 1
        reader = last // slots + window
        end = tl.where(reader >= chunks, T, tl.minimum(prefix + reader * chunk_length, T))
        valid += batch * valid_strides[0] + group * valid_strides[2]
        key_gradients(
            query, memory_key + batch * memory_key_strides[0] + group * memory_key_strides[2],
            memory_value + batch * memory_value_strides[0] + group * memory_value_strides[2], grad, lse, dots,
            d_memory_key + batch * d_memory_key_strides[0] + part * d_memory_key_strides[2],
            d_memory_value + batch * d_memory_value_strides[0] + part * d_memory_value_strides[2],
            query_strides[1], query_strides[2], memory_key_strides[1], memory_value_strides[1], grad_strides[1],
            grad_strides[2], d_memory_key_strides[1], d_memory_value_strides[1],
            places, load_valid(valid, valid_strides[1], places, chunks * slots), chunks * slots,
            prefix + first // slots * chunk_length, end, end, T,
            prefix, chunk_length, chunks, window, slots, scale2, scale,
            EACH, D, MAIN, TAIL, True, ROWS, SLOTS)
