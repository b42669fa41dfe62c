"""Rotary position embedding: a plain reference, and a kernel that is tested against it."""

from torch import Tensor

from megatron_m3.ops.choice import takes_triton
from megatron_m3.ops.rope import reference, triton_backend
from megatron_m3.ops.rope.reference import Table, turns


def rotate(vectors: Tensor, table: Table, backend: str = "torch", out: Tensor | None = None) -> Tensor:
    """See :func:`megatron_m3.ops.rope.reference.rotate`; one pass by Triton where that goes with ``backend``."""
    if not takes_triton(backend, vectors.shape[-1]):
        return reference.rotate(vectors, table, out)
    turned = triton_backend.rotate(vectors, table)
    return turned if out is None else out.copy_(turned)


__all__ = ["Table", "rotate", "turns"]
