"""The retriever: from chunks of token ids to the references that they read (section 3.1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from megatron_m3.references import ReferenceStore
from megatron_m3.retrieval.embedder import Embedder
from megatron_m3.retrieval.index import VectorIndex
from megatron_m3.retrieval.overlap import exceeds_overlap
from megatron_m3.tokenizer import Tokenizer


class Retrieved(NamedTuple):
    """References of each chunk by falling score, [N, k] each."""

    ids: np.ndarray
    """int64."""
    valid: np.ndarray
    """bool; where it is false there is no reference, and the id is none's."""
    scores: np.ndarray
    """float32 cosine."""


class Retriever:
    """Retrieves references by the text of a chunk."""

    def __init__(
        self, embedder: Embedder, index: VectorIndex, references: ReferenceStore, tokenizer: Tokenizer
    ) -> None:
        self.embedder, self.index, self.references, self.tokenizer = embedder, index, references, tokenizer

    @classmethod
    def open(cls, index: str | Path, references: str | Path, tokenizer: Tokenizer) -> Self:
        """Open an index folder, its embedder, and the references that it was made from.

        Raises:
            ArtifactError: the three do not belong together, or one is damaged.
        """
        store = ReferenceStore.open(references, tokenizer_hash=tokenizer.hash)
        opened = VectorIndex.open(index, references_hash=store.hash)
        return cls(opened.embedder(), opened, store, tokenizer)

    def embed(self, chunks: Sequence[Sequence[int]]) -> np.ndarray:
        """Vectors of the chunks' texts, float32 [N, size]."""
        return self.embedder.embed([self.tokenizer.decode(chunk) for chunk in chunks], "query")

    def retrieve(
        self,
        chunks: Sequence[Sequence[int]],
        k: int,
        *,
        exclude_overlap_with: Sequence[Sequence[int]] | None = None,
        max_overlap: float = 2 / 3,
    ) -> Retrieved:
        """The ``k`` references nearest to each chunk.

        Args:
            chunks: token ids of N chunks.
            k: references for each.
            exclude_overlap_with: for each chunk the token ids of its question; references that overlap with it more
                than ``max_overlap`` are passed over (the evaluation filter), and the next nearest take their places.
            max_overlap: largest overlap (eq. 6) with the question.
        """
        vectors = self.embed(chunks)
        if exclude_overlap_with is None:
            scores, ids, valid = self.index.search(vectors, k)
            return Retrieved(ids, valid, scores)

        def drop(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
            return exceeds_overlap(exclude_overlap_with, *self.references.tokens(ids), max_overlap, rows)

        scores, ids, valid = self.index.search_filtered(vectors, k, drop)
        return Retrieved(ids, valid, scores)
