"""Training sequences: a run of the corpus' chunks, and in the continual stage one reference for each chunk.

A sequence is ``sequence_length / chunk_length`` chunks of the stream of all documents' chunks. Every document begins
with a chunk; what its last chunk lacks is padded with EOS and does not count in the loss. So does what the stream's
last sequence lacks.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from megatron_m3.config import Config
from megatron_m3.data.neighbours import NeighbourStore
from megatron_m3.data.tokens import TokenStore
from megatron_m3.errors import ConfigError
from megatron_m3.references import ReferenceStore
from megatron_m3.retrieval.overlap import exceeds_overlap
from megatron_m3.tokenizer import Tokenizer

REFERENCE_ARRAYS = ("references", "reference_lengths", "chunk_references", "reference_ids")


class Run(NamedTuple):
    """Neighbouring chunks of one document in a sequence."""

    document: int
    first: int
    """First chunk, counted in the document."""
    slot: int
    """First chunk, counted in the sequence."""
    num_chunks: int


class TrainingDataset:
    """Sequences by number, as arrays; the same number gives the same arrays, whatever the parallel layout."""

    def __init__(self, config: Config) -> None:
        """Open the artifacts that ``config.data`` names, and check that they belong together.

        Raises:
            ConfigError: a folder is not given, or its lengths are not the run's.
            ArtifactError: a folder is damaged, or made from another tokenizer, corpus or knowledge base.
        """
        data, memory = config.data, config.memory
        _check_given(config)
        self.chunk_length, self.sequence_length = memory.chunk_length, data.sequence_length
        self.reference_length, self.max_overlap = memory.reference_length, data.max_overlap
        self.query_chunk = memory.query_chunk
        tokenizer = Tokenizer.load(data.tokenizer)
        self.bos_id, self.eos_id = tokenizer.bos_id, tokenizer.eos_id
        self.tokens = TokenStore.open(data.tokens, tokenizer_hash=tokenizer.hash)
        self.first_chunks = self.tokens.first_chunks(self.chunk_length)
        self.chunks_per_sequence = self.sequence_length // self.chunk_length
        self.num_references = config.num_references
        self.references: ReferenceStore | None = None
        if config.training.stage == "continual":
            self.references = ReferenceStore.open(data.references, tokenizer_hash=tokenizer.hash)
            self.neighbours = NeighbourStore.open(
                data.neighbours, tokens=self.tokens.hash, references=self.references.hash, tokenizer=tokenizer.hash
            )
            self._check_lengths(config)

    def _check_lengths(self, config: Config) -> None:
        if self.neighbours.chunk_length != self.chunk_length:
            raise ConfigError(
                f"memory.chunk_length={self.chunk_length}: {config.data.neighbours} was made for "
                f"{self.neighbours.chunk_length}; set it so, or make the neighbours again"
            )
        if self.references and self.references.reference_length > self.reference_length:
            raise ConfigError(
                f"memory.reference_length={self.reference_length}: {config.data.references} has references of "
                f"up to {self.references.reference_length} tokens; set it so, or cut the references again"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the arrays of a sequence and of a micro-batch."""
        return ("context", "labels", "loss_mask", *(REFERENCE_ARRAYS if self.references else ()))

    def __len__(self) -> int:
        return -(-int(self.first_chunks[-1]) // self.chunks_per_sequence)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sequence ``index``.

        Returns:
            ``context`` and ``labels`` int64 [S]: BOS and all tokens but the last, and all tokens; ``loss_mask`` float32
            [S]: 0 where padded. In the continual stage also, for N references, ``references`` int64
            [N, reference_length], zero padded, ``reference_lengths`` int64 [N] and ``reference_ids`` int64 [N]: 0 and
            -1 where one is missing, and ``chunk_references`` int64 [chunks]: which of the N each chunk has, or -1.
        """
        tokens, real = self.read(index)
        sequence = {
            "context": np.concatenate([[self.bos_id], tokens[:-1]]),
            "labels": tokens,
            "loss_mask": real.astype(np.float32),
        }
        if self.references is not None:
            sequence |= self._read_references(*self.choose_references(index, tokens[real]))
        return sequence

    def _read_references(self, ids: np.ndarray, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of references, in the order of the chunks that have one, up to the most that are encoded."""
        assert self.references is not None
        chunks = np.flatnonzero(chosen)[: self.num_references]
        count = len(chunks)
        references = np.zeros((self.num_references, self.reference_length), np.int64)
        lengths, kept_ids = np.zeros(self.num_references, np.int64), np.full(self.num_references, -1)
        places = np.full(len(ids), -1)
        kept_ids[:count], places[chunks] = ids[chunks], np.arange(count)
        found = self.references.tokens(ids[chunks])
        references[:count, : self.references.reference_length], lengths[:count] = found
        return dict(zip(REFERENCE_ARRAYS, (references, lengths, places, kept_ids), strict=True))

    def runs(self, index: int) -> Iterator[Run]:
        """The documents' chunks that sequence ``index`` is made of, in order."""
        chunk = index * self.chunks_per_sequence
        end = min(chunk + self.chunks_per_sequence, int(self.first_chunks[-1]))
        document, slot = int(np.searchsorted(self.first_chunks, chunk, side="right")) - 1, 0
        while chunk < end:
            first, after = int(self.first_chunks[document]), int(self.first_chunks[document + 1])
            num_chunks = min(after, end) - chunk
            yield Run(document, chunk - first, slot, num_chunks)
            document, slot, chunk = document + 1, slot + num_chunks, chunk + num_chunks

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [S] of sequence ``index``, EOS where padded, and where they are real, bool [S]."""
        tokens = np.full(self.sequence_length, self.eos_id, np.int64)
        real = np.zeros(self.sequence_length, bool)
        for run in self.runs(index):
            first = run.first * self.chunk_length
            count = min(run.num_chunks * self.chunk_length, int(self.tokens.lengths[run.document]) - first)
            place = slice(run.slot * self.chunk_length, run.slot * self.chunk_length + count)
            tokens[place], real[place] = self.tokens.read(run.document, first, count), True
        return tokens, real

    def candidates(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [chunks, k] of the references retrieved for each chunk of a sequence, best first, and validity.

        With ``query_chunk`` "previous" a chunk has what the chunk before it in its document retrieved; a document's
        first chunk has none.
        """
        found = [(run, self.neighbours.rows(run.document)) for run in self.runs(index)]
        ids = np.zeros((self.chunks_per_sequence, found[0][1].ids.shape[1]), np.int64)
        valid = np.zeros(ids.shape, bool)
        back = 1 if self.query_chunk == "previous" else 0
        for run, rows in found:
            skipped = max(0, back - run.first)
            source = slice(run.first + skipped - back, run.first + run.num_chunks - back)
            place = slice(run.slot + skipped, run.slot + run.num_chunks)
            ids[place], valid[place] = rows.ids[source], rows.valid[source]
        return ids, valid

    def choose_references(self, index: int, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each chunk the best reference that ``tokens``, the sequence, do not give away (leakage filter, eq. 6).

        Returns:
            ids int64 [chunks], and bool [chunks]: whether the chunk has one.
        """
        assert self.references is not None
        ids, valid = self.candidates(index)
        chosen, done = np.zeros(len(ids), np.int64), np.zeros(len(ids), bool)
        leaks: dict[int, bool] = {}
        for column in range(ids.shape[1]):
            wanted = valid[:, column] & ~done
            if not wanted.any():
                continue
            new = [int(one) for one in np.unique(ids[wanted, column]) if int(one) not in leaks]
            leaks.update(zip(new, exceeds_overlap(tokens, *self.references.tokens(new), self.max_overlap), strict=True))
            for chunk in np.flatnonzero(wanted):
                if not leaks[int(ids[chunk, column])]:
                    chosen[chunk], done[chunk] = ids[chunk, column], True
        return chosen, done


def _check_given(config: Config) -> None:
    needed = ["tokenizer", "tokens"] + (["references", "neighbours"] if config.training.stage == "continual" else [])
    for name in needed:
        if not getattr(config.data, name):
            raise ConfigError(f"data.{name}: give its folder; the {config.training.stage} stage needs it")
