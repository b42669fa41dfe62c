"""Weights of tokens without a matrix of scores in device memory: statistics of rows, then sums of columns.

A program sums the columns of a block of keys over all rows and all query heads that share the key-value head, in one
fixed order: equal keys get equal weights, and a weight depends on its reference alone. Where one block holds all keys
(``WHOLE``) the statistics of a row are taken there, and each query is read once. Scores are in units of log2.
"""

# Triton reads annotations of kernel arguments as their types.
# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from megatron_m3.ops.memory_attention.triton_forward import load_rows, product

__all__ = ["statistics_kernel", "weights_kernel"]


@triton.jit
def statistics_kernel(
    query, key, lengths, lse, query_strides, key_strides, T, heads, scale2,
    REPEAT: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """Log-sum-exp (base 2) ``[N, H, T]`` of the scores of ``ROWS`` queries of one head with all keys."""
    reference, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    length = tl.load(lengths + reference).to(tl.int32)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    query += reference * query_strides[0] + head * query_strides[2]
    key += reference * key_strides[0] + head // REPEAT * key_strides[2]
    q_main, q_tail = load_rows(query, query_strides[1], rows, rows < length, D, MAIN, TAIL)
    most = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, length, KEYS):
        keys = start + tl.arange(0, KEYS)
        k_main, k_tail = load_rows(key, key_strides[1], keys, keys < length, D, MAIN, TAIL)
        score = product(q_main, q_tail, k_main, k_tail, TAIL) * scale2
        score = tl.where((keys < length)[None, :], score, -float("inf"))
        new_most = tl.maximum(most, tl.max(score, 1))
        total = total * tl.exp2(most - new_most) + tl.sum(tl.exp2(score - new_most[:, None]), 1)
        most = new_most
    tl.store(lse + (reference * heads + head) * T + rows, most + tl.log2(total), mask=rows < length)


@triton.jit
def weights_kernel(
    query, key, lengths, lse, weights, query_strides, key_strides, T, groups, scale2,
    REPEAT: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr, EXP: tl.constexpr,
):
    """Weights ``[N, G, T]`` of ``KEYS`` tokens for one key-value head, -inf at padding.

    With ``EXP`` no row is normalised, and the logarithm (base 2) of the sum is written.
    """
    reference, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    length = tl.load(lengths + reference).to(tl.int32)
    keys = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    query += reference * query_strides[0] + group * REPEAT * query_strides[2]
    key += reference * key_strides[0] + group * key_strides[2]
    k_main, k_tail = load_rows(key, key_strides[1], keys, keys < length, D, MAIN, TAIL)
    most = tl.full((KEYS,), -float("inf"), tl.float32)
    total = tl.zeros((KEYS,), tl.float32)
    blocks = tl.cdiv(length, ROWS)
    for block in range(REPEAT * blocks):
        head = block // blocks
        rows = block % blocks * ROWS + tl.arange(0, ROWS)
        inside = (rows < length)[:, None]
        of_head = query + head * query_strides[2]
        q_main, q_tail = load_rows(of_head, query_strides[1], rows, rows < length, D, MAIN, TAIL)
        score = product(q_main, q_tail, k_main, k_tail, TAIL) * scale2
        if EXP:
            score = tl.where(inside, score, -float("inf"))
            new_most = tl.maximum(most, tl.max(score, 0))
            total = total * tl.exp2(most - new_most) + tl.sum(tl.exp2(score - new_most[None, :]), 0)
            most = new_most
        elif WHOLE:
            score = tl.where((keys < length)[None, :], score, -float("inf"))
            power = tl.exp2(score - tl.max(score, 1)[:, None])
            total += tl.sum(tl.where(inside, power / tl.sum(power, 1)[:, None], 0.0), 0)
        else:
            row = (reference * groups * REPEAT + group * REPEAT + head) * T + rows
            row_lse = tl.load(lse + row, mask=rows < length, other=float("inf"))
            total += tl.sum(tl.exp2(score - row_lse[:, None]), 0)
    weight = most + tl.log2(total) if EXP else total
    weight = tl.where(keys < length, weight, -float("inf"))
    tl.store(weights + tl.program_id(0).to(tl.int64) * T + keys, weight, mask=keys < T)
