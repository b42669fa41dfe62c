"""From a chunk of text to reference ids: embedder, vector index, retriever, and the overlap filter."""

from megatron_m3.retrieval.overlap import exceeds_overlap, overlap

__all__ = ["exceeds_overlap", "overlap"]
