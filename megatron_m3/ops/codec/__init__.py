"""Compression of key and value vectors to a few bytes, and back."""

from megatron_m3.ops.codec.reference import (
    FaissVectors,
    RawVectors,
    VectorCodec,
    codebook_bytes,
    vectors_needed,
)

__all__ = ["FaissVectors", "RawVectors", "VectorCodec", "codebook_bytes", "vectors_needed"]
