"""The tokenized corpus: a Megatron indexed dataset with a manifest, and the grid of chunks over its documents."""

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self, overload

import numpy as np

from megatron_m3.errors import ArtifactError
from megatron_m3.manifest import Manifest, check_files, check_input, read_manifest
from megatron_m3.platform import select

KIND, SCHEMA, PREFIX, IDS = "tokens", 1, "tokens", "documents.jsonl"
TOKENS = (f"{PREFIX}.bin", f"{PREFIX}.idx")
STRIDE = 1024
"""Ids that are read at a time; memory holds where each so many begin."""


class TokenStore:
    """Reads documents' token ids, EOS included, memory-mapped."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        select()  # before anything of megatron.core is imported
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.folder, self.manifest, self.hash = folder, manifest, manifest.hash
        self.tokenizer_hash = manifest.inputs["tokenizer"]
        self._indexed = IndexedDataset(str(folder / PREFIX))
        self.lengths: np.ndarray = self._indexed.sequence_lengths
        """Tokens in each document, EOS included; int32, mapped."""

    @classmethod
    def open(cls, folder: str | Path, *, check: bool = False, tokenizer_hash: str | None = None) -> Self:
        """Open a folder made by ``m3 data tokenize``.

        The tokens are read once to compare their checksums, 1-2 s a GB; ``check`` does that for the documents' ids
        too, which else waits for :meth:`document_ids`.

        Raises:
            ArtifactError: not such a folder, a damaged one, or one of another tokenizer.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, KIND, SCHEMA)
        check_files(folder, manifest, checksums=check or TOKENS)
        if tokenizer_hash is not None:
            check_input(folder, manifest, "tokenizer", tokenizer_hash)
        return cls(folder, manifest)

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> np.ndarray:
        """All tokens of one document, EOS last."""
        return self.read(index, 0, int(self.lengths[index]))

    def read(self, index: int, first: int, count: int) -> np.ndarray:
        """``count`` tokens of a document from its token ``first`` on."""
        tokens: np.ndarray = self._indexed.get(index, first, count)
        return tokens

    def document_ids(self) -> "DocumentIds":
        """The id of each document in its corpus; the file is read through, once, to find its lines.

        Raises:
            ArtifactError: the file of ids is damaged.
        """
        check_files(self.folder, self.manifest, names=[IDS])
        ids = DocumentIds(self.folder / IDS)
        if ids.sha256 != self.manifest.files[IDS]["sha256"]:
            check_files(self.folder, self.manifest, checksums=True, names=[IDS])
        if len(ids) != len(self):
            raise ArtifactError(f"{self.folder}: {len(ids)} ids for {len(self)} documents; make the tokens again")
        return ids

    def first_chunks(self, chunk_length: int) -> np.ndarray:
        """The first chunk of each document in the stream of all documents' chunks, int64 [documents + 1].

        The last number is the number of chunks. A document of n tokens has ceil(n / chunk_length) chunks.
        """
        return np.concatenate([[0], np.cumsum(-(-self.lengths // chunk_length), dtype=np.int64)])


class DocumentIds(Sequence[str]):
    """The ids of documents, read from their file when asked for: memory grows by 8 bytes for a thousand."""

    def __init__(self, path: Path) -> None:
        self.path, self._length, starts, digest, read = path, 0, [np.zeros(1, np.int64)], hashlib.sha256(), 0
        with path.open("rb") as stream:
            while data := stream.read(1 << 20):
                digest.update(data)
                ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
                starts.append(read + 1 + ends[STRIDE - 1 - self._length % STRIDE :: STRIDE])
                self._length += len(ends)
                read += len(data)
        self.sha256 = digest.hexdigest()
        self._starts = np.concatenate(starts)
        self._some = functools.lru_cache(4)(self._read)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._some(index // STRIDE)[index % STRIDE]

    def _read(self, part: int) -> list[str]:
        with self.path.open("rb") as stream:
            stream.seek(self._starts[part])
            return [json.loads(line)["id"] for line in itertools.islice(stream, STRIDE)]
