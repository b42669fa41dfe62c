"""Attention with explicit memory: a plain reference, and backends that are tested against it."""

from types import ModuleType

from megatron_m3.errors import UnsupportedError
from megatron_m3.ops.memory_attention import reference, te_backend, torch_backend, triton_backend

BACKENDS = {"reference": reference, "te": te_backend, "torch": torch_backend, "triton": triton_backend}


def get_backend(name: str) -> ModuleType:
    """The backend ``name``: a module with memory_attention, causal_attention and reference_attention."""
    if name not in BACKENDS:
        raise UnsupportedError(f"model.attention={name}: no such backend; known are {', '.join(BACKENDS)}")
    return BACKENDS[name]


__all__ = ["BACKENDS", "get_backend"]
