"""From a chunk of text to reference ids: embedder, vector index, retriever, and the overlap filter."""

from megatron_m3.retrieval.embedder import Embedder, load_embedder
from megatron_m3.retrieval.index import MISSING, Found, VectorIndex
from megatron_m3.retrieval.overlap import exceeds_overlap, overlap, overlaps
from megatron_m3.retrieval.retriever import Retrieved, Retriever

__all__ = [
    "MISSING",
    "Embedder",
    "Found",
    "Retrieved",
    "Retriever",
    "VectorIndex",
    "exceeds_overlap",
    "load_embedder",
    "overlap",
    "overlaps",
]
