"""Rotary position embedding in one pass: each number is read once and written once.

``HALF`` is a power of two that holds half a head's numbers.
"""

# Triton reads annotations of kernel arguments as their types.
# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def rotate_kernel(
    vectors, cosine, sine, out, vector_strides, table_strides, out_strides, batch, heads,
    D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BACKWARD: tl.constexpr,
):
    """``HEADS`` heads of one position of one sequence; strides are of position, sequence and head.

    ``BACKWARD`` is the transposed turn, that of gradients.
    """
    row = tl.program_id(0).to(tl.int64)
    position, sequence = row // batch, row % batch
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    is_column = column < D // 2
    inside = (head < heads)[:, None] & is_column[None, :]
    low = vectors + position * vector_strides[0] + sequence * vector_strides[1] \
        + head[:, None] * vector_strides[2] + column[None, :]
    low_number = tl.load(low, mask=inside, other=0.0).to(tl.float32)
    high_number = tl.load(low + D // 2, mask=inside, other=0.0).to(tl.float32)
    place = position * table_strides[0] + sequence * table_strides[1] + column
    low_cosine = tl.load(cosine + place, mask=is_column, other=0.0)[None, :]
    high_cosine = tl.load(cosine + place + D // 2, mask=is_column, other=0.0)[None, :]
    low_sine = tl.load(sine + place, mask=is_column, other=0.0)[None, :]
    high_sine = tl.load(sine + place + D // 2, mask=is_column, other=0.0)[None, :]
    if BACKWARD:
        new_low = low_number * low_cosine + high_number * high_sine
        new_high = high_number * high_cosine + low_number * low_sine
    else:
        new_low = low_number * low_cosine + high_number * low_sine
        new_high = high_number * high_cosine + low_number * high_sine
    to = out + position * out_strides[0] + sequence * out_strides[1] \
        + head[:, None] * out_strides[2] + column[None, :]
    tl.store(to, new_low.to(out.dtype.element_ty), mask=inside)
    tl.store(to + D // 2, new_high.to(out.dtype.element_ty), mask=inside)
