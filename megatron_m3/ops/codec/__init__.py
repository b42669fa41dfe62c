"""Compression of key and value vectors to a few bytes, and back."""

from megatron_m3.ops.codec.product import ProductCode
from megatron_m3.ops.codec.reference import (
    FaissVectors,
    Fp8Vectors,
    RawVectors,
    VectorCodec,
    codebook_bytes,
    vectors_needed,
)

__all__ = ["FaissVectors", "Fp8Vectors", "ProductCode", "RawVectors", "VectorCodec", "codebook_bytes", "vectors_needed"]
