"""The reference store: token ids, text and source of every reference, in memory-mapped block files.

Reference ``id`` is row ``id % block_size`` of block ``id // block_size``. Arrays of a block of n references:
``tokens`` [n, reference_length], zero padded; ``lengths`` [n]; ``text`` bytes and ``text_offsets`` [n + 1];
``document`` bytes (the id of its document) and ``document_offsets`` [n + 1]; ``first_token`` [n]. A deleted reference
has no tokens, no text and no document.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from megatron_m3.errors import ArtifactError, DataError
from megatron_m3.manifest import (
    BlockReader,
    Manifest,
    block_name,
    check_files,
    check_input,
    map_block,
    read_manifest,
)
from megatron_m3.references.edits import Edit

KIND, SCHEMA = "references", 1


type Ragged = tuple[np.ndarray, np.ndarray]
"""The values of all rows, one row after another, and how many each row has."""


def arrays_of_block(
    pieces: Sequence[tuple[str, Sequence[int], str, int]], reference_length: int, vocab_size: int
) -> dict[str, np.ndarray]:
    """The arrays of a block, from (text, tokens, document id, first token) of each reference."""
    texts, tokens, documents, first_tokens = zip(*pieces, strict=True) if pieces else ((),) * 4
    flat = np.fromiter(itertools.chain.from_iterable(tokens), token_dtype(vocab_size))
    lengths = np.array(list(map(len, tokens)), np.int64)
    return pack_block((flat, lengths), _bytes(texts), _bytes(documents), np.array(first_tokens), reference_length)


def pack_block(
    tokens: Ragged, text: Ragged, document: Ragged, first_token: np.ndarray, reference_length: int
) -> dict[str, np.ndarray]:
    """The arrays of a block, from its columns; texts and document ids are UTF-8 bytes."""
    flat, lengths = tokens
    padded = np.zeros((len(lengths), reference_length), flat.dtype)
    padded[np.arange(reference_length) < lengths[:, None]] = flat
    return {
        "tokens": padded,
        "lengths": lengths.astype(np.int32),
        "text": text[0],
        "text_offsets": _offsets(text[1]),
        "document": document[0],
        "document_offsets": _offsets(document[1]),
        "first_token": first_token.astype(np.int64),
    }


def token_dtype(vocab_size: int) -> type[np.generic]:
    """Type of token ids on disk."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def _bytes(texts: Sequence[str]) -> Ragged:
    encoded = [text.encode() for text in texts]
    return np.frombuffer(b"".join(encoded), np.uint8), np.array(list(map(len, encoded)), np.int64)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


class ReferenceStore:
    """Reads the knowledge base; ids run from 0 to ``len(store) - 1``."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest, self.hash = folder, manifest, manifest.hash
        self.tokenizer_hash = manifest.inputs["tokenizer"]
        self.reference_length: int = manifest.settings["reference_length"]
        self.block_size: int = manifest.settings["block_size"]
        self.edits = tuple(Edit.from_dict(fields) for fields in manifest.settings.get("edits", ()))
        """What was done to the store that it descends from, in order."""
        self._blocks = BlockReader(folder, manifest)
        self.num_blocks = len(manifest.files)
        self._length = (self.num_blocks - 1) * self.block_size + len(self._blocks[self.num_blocks - 1]["lengths"])

    @classmethod
    def open(cls, folder: str | Path, *, check: bool = False, tokenizer_hash: str | None = None) -> Self:
        """Open a folder made by ``m3 data references``; ``check`` verifies every checksum now, else each
        block's when it is first used.

        Raises:
            ArtifactError: not a reference folder, a damaged one, or one of another tokenizer.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, KIND, SCHEMA)
        check_files(folder, manifest, checksums=check)
        if tokenizer_hash is not None:
            check_input(folder, manifest, "tokenizer", tokenizer_hash)
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self._length

    @property
    def token_dtype(self) -> np.dtype:
        """Type of token ids on disk."""
        return self._blocks[0]["tokens"].dtype

    def tokens(self, ids: np.ndarray | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [N, reference_length], zero padded, and lengths int32 [N].

        Raises:
            DataError: an id that no reference has.
        """
        ids = np.asarray(ids, np.int64)
        if ids.size and not (ids.min() >= 0 and ids.max() < len(self)):
            raise DataError(f"{self.folder}: reference {max(ids, key=abs)} is not in 0-{len(self) - 1}")
        tokens = np.empty((len(ids), self.reference_length), np.int32)
        lengths = np.empty(len(ids), np.int32)
        blocks = ids // self.block_size
        for index in np.unique(blocks):
            chosen, block = blocks == index, self._blocks[int(index)]
            rows = ids[chosen] % self.block_size
            tokens[chosen], lengths[chosen] = block["tokens"][rows], block["lengths"][rows]
        return tokens, lengths

    def lengths(self) -> np.ndarray:
        """Tokens of every reference, int32 [N], for estimates: only they are read, and no checksum is compared."""
        lengths = np.empty(len(self), np.int32)
        for index in range(self.num_blocks):
            found = map_block(self.folder / block_name(index))["lengths"]
            lengths[index * self.block_size :][: len(found)] = found
        return lengths

    def edits_since(self, base: str) -> tuple[Edit, ...]:
        """What was done since the store with hash ``base``, in order; nothing where it is this one.

        Raises:
            ArtifactError: this store does not descend from that one.
        """
        if base == self.hash:
            return ()
        for place, edit in enumerate(self.edits):
            if edit.base == base:
                return self.edits[place:]
        raise ArtifactError(f"{self.folder}: is not the knowledge base {base[:12]}, nor an edited one of it; give one "
                            "that `m3 data edit-references` made from it")

    def ids_of_document(self, document: str) -> np.ndarray:
        """Ids of the references that were cut from a document, int64, ascending.

        Raises:
            DataError: there is none.
        """
        wanted, found = document.encode(), []
        for index in range(self.num_blocks):
            block = self._blocks[index]
            starts, ends = block["document_offsets"][:-1], block["document_offsets"][1:]
            same = np.flatnonzero(ends - starts == len(wanted))
            names = block["document"]
            found += [index * self.block_size + int(row) for row in same
                      if names[starts[row] : ends[row]].tobytes() == wanted]
        if not (found and wanted):
            raise DataError(f"{self.folder}: no reference is of a document {document!r}; `m3 bank inspect --reference` "
                            "shows the document of a reference")
        return np.array(found, np.int64)

    def text(self, id: int) -> str:
        """Text of one reference."""
        return self._text("text", id)

    def texts(self, ids: Sequence[int] | range) -> list[str]:
        """Texts of several references."""
        return [self.text(id) for id in ids]

    def source(self, id: int) -> tuple[str, int]:
        """The id of the document that a reference was cut from, and its first token's place there."""
        return self._text("document", id), int(self._row(id)[0]["first_token"][id % self.block_size])

    def _row(self, id: int) -> tuple[dict[str, np.ndarray], int]:
        if not 0 <= id < len(self):
            raise DataError(f"{self.folder}: reference {id} is not in 0-{len(self) - 1}")
        return self._blocks[id // self.block_size], id % self.block_size

    def _text(self, name: str, id: int) -> str:
        block, row = self._row(id)
        first, last = block[f"{name}_offsets"][row : row + 2]
        return block[name][first:last].tobytes().decode()


class SelectedReferences(ReferenceStore):
    """Some references of a store as a store of their own, numbered from 0."""

    def __init__(self, store: ReferenceStore, ids: np.ndarray) -> None:
        """``ids`` int64: which, in which order."""
        super().__init__(store.folder, store.manifest)
        self.store, self.ids, self._length = store, ids, len(ids)

    def tokens(self, ids: np.ndarray | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`ReferenceStore`."""
        return self.store.tokens(self.ids[np.asarray(ids, np.int64)])

    def lengths(self) -> np.ndarray:
        """See :class:`ReferenceStore`."""
        return self.store.lengths()[self.ids]

    def text(self, id: int) -> str:
        """See :class:`ReferenceStore`."""
        return self.store.text(int(self.ids[id]))

    def source(self, id: int) -> tuple[str, int]:
        """See :class:`ReferenceStore`."""
        return self.store.source(int(self.ids[id]))
