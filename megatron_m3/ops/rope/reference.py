"""Rotary position embedding in plain torch: pairs (i, i + D/2) of a head's D numbers are turned by an angle each."""

import torch
from torch import Tensor

type Table = tuple[Tensor, Tensor]
"""Cosines ``[..., D]``, and sines with the sign by which each number takes its partner, in fp32 or wider."""


def turns(angle: Tensor, dtype: torch.dtype) -> Table:
    """The table of pairs' angles ``[..., D/2]``."""
    cosine, sine = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)


def rotate(vectors: Tensor, table: Table, out: Tensor | None = None) -> Tensor:
    """Vectors ``[..., heads, D]`` turned by a table whose leading axes broadcast; the result has the vectors' dtype.

    It is written to ``out``, if given; then it has no gradient.
    """
    cosine, sine = table
    # widened once: each product of two types would widen its own copy
    wide = vectors.to(torch.promote_types(vectors.dtype, cosine.dtype))
    parts = wide * cosine, wide.roll(wide.shape[-1] // 2, -1) * sine
    return torch.add(*parts).to(vectors.dtype) if out is None else torch.add(*parts, out=out)
