"""The tokenized corpus: a Megatron indexed dataset with a manifest, and the grid of chunks over its documents."""

import json
from pathlib import Path
from typing import Self

import numpy as np

from megatron_m3.manifest import Manifest, check_files, check_input, read_manifest
from megatron_m3.platform import select

KIND, SCHEMA, PREFIX, IDS = "tokens", 1, "tokens", "documents.jsonl"
TOKENS = (f"{PREFIX}.bin", f"{PREFIX}.idx")


class TokenStore:
    """Reads documents' token ids, EOS included, memory-mapped."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        select()  # before anything of megatron.core is imported
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.folder, self.manifest, self.hash = folder, manifest, manifest.hash
        self.tokenizer_hash = manifest.inputs["tokenizer"]
        self._indexed = IndexedDataset(str(folder / PREFIX))
        self.lengths = np.asarray(self._indexed.sequence_lengths, np.int64)
        """Tokens in each document, EOS included."""

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

    def document_ids(self) -> list[str]:
        """The id of each document in its corpus.

        Raises:
            ArtifactError: the file of ids is damaged.
        """
        check_files(self.folder, self.manifest, checksums=True, names=[IDS])
        with (self.folder / IDS).open() as stream:
            return [json.loads(line)["id"] for line in stream]

    def first_chunks(self, chunk_length: int) -> np.ndarray:
        """The first chunk of each document in the stream of all documents' chunks, int64 [documents + 1].

        The last number is the number of chunks. A document of n tokens has ceil(n / chunk_length) chunks.
        """
        return np.concatenate([[0], np.cumsum(-(-self.lengths // chunk_length))])
