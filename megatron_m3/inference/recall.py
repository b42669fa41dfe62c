"""Recall: the text of a chunk retrieves references, and their explicit memories are fetched (section 3.1)."""

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_m3.inference.generation import ReadReference, Statistics
from megatron_m3.inference.reading import ChunkMemories

if TYPE_CHECKING:
    from megatron_m3.memory import ExplicitMemories, MemorySource
    from megatron_m3.retrieval import Retrieved, Retriever


@dataclass(frozen=True, kw_only=True)
class Recalled:
    """What some chunks retrieved: rows of the distinct memories, R of them a chunk."""

    memories: "ExplicitMemories"
    rows: np.ndarray
    """Row of ``memories``, int [chunks, R]; 0 where ``valid`` is False."""
    valid: np.ndarray
    """bool [chunks, R]."""
    ids: np.ndarray
    scores: np.ndarray


class Recall:
    """Chunks of tokens to memories. Results that the index does not have stay empty, as do references that were deleted
    from the bank: they are never read."""

    def __init__(
        self,
        retriever: "Retriever",
        source: "MemorySource",
        *,
        references_per_chunk: int,
        memory_heads: Mapping[int, Sequence[int]],
        heads: slice,
        restricted_heads: Mapping[int, torch.Tensor],
        device: torch.device,
        max_overlap: float | None = None,
    ) -> None:
        """``heads`` are the kv heads of this process, which ``source`` delivers, if not all.

        ``max_overlap`` is the evaluation filter: references that overlap more with the prompt are passed over.

        ``memory_heads`` are those of each memory layer; ``restricted_heads`` is :attr:`ChunkMemories.memory_heads`.
        """
        self.retriever, self.source = retriever, source
        self.references_per_chunk, self.device = references_per_chunk, device
        first = source.delivery.heads.start or 0
        self.heads = slice(heads.start - first, heads.stop - first)
        self.max_overlap, self.restricted_heads = max_overlap, restricted_heads
        self.layers = {layer: place for place, layer in enumerate(memory_heads)}
        self.held = [[head - first for head in heads] for heads in memory_heads.values()]
        self._behind = ThreadPoolExecutor(1, thread_name_prefix="look ahead")
        self._ahead: Future[None] | None = None
        self._coming: list[tuple[Sequence[int], Sequence[int]]] = []
        self._of_coming, self._retrieving = threading.Lock(), threading.Lock()

    def __call__(
        self, chunks: Sequence[Sequence[int]], questions: Sequence[Sequence[int]], statistics: Statistics
    ) -> Recalled:
        """Retrieve with each chunk and fetch every distinct reference once; ``questions`` are the chunks' prompts."""
        if not chunks:
            none = np.zeros((0, self.references_per_chunk), dtype=np.int64)
            return Recalled(memories=self.source.fetch(none[:, 0]), rows=none, valid=none > 0, ids=none, scores=none)
        start = time.perf_counter()
        with self._retrieving:
            found = self._retrieve(chunks, questions)
        retrieved = time.perf_counter()
        distinct, inverse = np.unique(found.ids[found.valid], return_inverse=True)
        rows = np.zeros(found.ids.shape, dtype=np.int64)
        rows[found.valid] = inverse
        memories = self.source.fetch(distinct)
        valid = found.valid & (memories.num_kept.numpy()[rows] > 0 if len(distinct) else False)
        statistics.retrieval_seconds += retrieved - start
        statistics.fetch_seconds += time.perf_counter() - retrieved
        statistics.references_read += int(valid.sum())
        statistics.seen.update(found.ids[valid].tolist())
        return Recalled(memories=memories, rows=rows, valid=valid, ids=found.ids, scores=found.scores)

    def look_ahead(self, chunks: Sequence[Sequence[int]], questions: Sequence[Sequence[int]]) -> None:
        """In the background, retrieve with what there is of chunks, and have the references' memories brought.

        Returns at once; what comes while others are retrieved is retrieved together. Errors are nobody's: the recall of
        the whole chunk does all of it again, and meets what is still wrong.
        """
        with self._of_coming:
            self._coming += zip(chunks, questions, strict=True)
            if self._ahead is None:
                self._ahead = self._behind.submit(self._look_ahead)

    def _look_ahead(self) -> None:
        while True:
            with self._of_coming:
                coming, self._coming = self._coming, []
                if not coming:
                    self._ahead = None
                    return
            try:
                with self._retrieving:
                    found = self._retrieve(*zip(*coming, strict=True))
                    self.source.prefetch(found.ids[found.valid])
            except Exception as error:
                print(f"not read ahead: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Wait for what is retrieved in the background, if anything is."""
        with self._of_coming:
            ahead = self._ahead
        if ahead is not None:
            ahead.result()

    def _retrieve(self, chunks: Sequence[Sequence[int]], questions: Sequence[Sequence[int]]) -> "Retrieved":
        if self.max_overlap is None:
            return self.retriever.retrieve(chunks, self.references_per_chunk)
        return self.retriever.retrieve(
            chunks, self.references_per_chunk, exclude_overlap_with=questions, max_overlap=self.max_overlap
        )

    def references(self, recalled: Recalled, chunk: int) -> list[ReadReference]:
        """The references that ``chunk`` of ``recalled`` reads, best first.

        Where the source delivers some heads only, kept positions are those of these heads.
        """
        return [
            ReadReference(
                id=int(recalled.ids[chunk, place]),
                score=float(recalled.scores[chunk, place]),
                text=self.retriever.references.text(int(recalled.ids[chunk, place])),
                kept_positions=self._kept_positions(recalled.memories, int(recalled.rows[chunk, place])),
            )
            for place in np.flatnonzero(recalled.valid[chunk])
        ]

    def _kept_positions(self, memories: "ExplicitMemories", row: int) -> list[list[list[int]]]:
        by_layer = zip(self.held, memories.kept_positions(row).tolist(), strict=True)
        return [[kept if head in held else [] for head, kept in enumerate(heads)] for held, heads in by_layer]

    def memories_of(self, recalled: Recalled, chunk_BC: np.ndarray, has_chunk_BC: np.ndarray) -> ChunkMemories:
        """The memories of a grid of chunks, each naming one of ``recalled``; none where ``has_chunk_BC`` is False."""
        if not len(recalled.rows):
            empty = np.zeros((*chunk_BC.shape, self.references_per_chunk), dtype=np.int64)
            rows_BCR, valid_BCR = empty, empty.astype(bool)
        else:
            rows_BCR = recalled.rows[chunk_BC]
            valid_BCR = recalled.valid[chunk_BC] & has_chunk_BC[..., None]
        return ChunkMemories(
            memories=recalled.memories,
            rows_BCR=torch.from_numpy(rows_BCR).to(self.device),
            valid_BCR=torch.from_numpy(valid_BCR).to(self.device),
            layers=self.layers,
            heads=self.heads,
            memory_heads=self.restricted_heads,
        )
