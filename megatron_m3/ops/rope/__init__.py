"""Rotary position embedding: a plain reference, and a kernel that is tested against it."""

from torch import Tensor

from megatron_m3.ops.choice import takes_triton
from megatron_m3.ops.rope import reference, triton_backend
from megatron_m3.ops.rope.reference import Table, turns


def rotate(vectors: Tensor, table: Table, backend: str = "torch") -> Tensor:
    """See :func:`megatron_m3.ops.rope.reference.rotate`; one pass by Triton where that goes with ``backend``."""
    return (triton_backend if takes_triton(backend, vectors.shape[-1]) else reference).rotate(vectors, table)


__all__ = ["Table", "rotate", "turns"]
