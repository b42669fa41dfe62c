"""Attention of one new token of each sequence to its cache: a plain reference, and kernels tested against it."""

from megatron_m3.ops.cached_attention import reference, triton_backend

__all__ = ["reference", "triton_backend"]
