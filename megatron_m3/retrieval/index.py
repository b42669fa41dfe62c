"""The vector index: FAISS over the references' vectors, inner product, which is cosine as they have length 1."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from megatron_m3.errors import ArtifactError
from megatron_m3.manifest import Manifest, check_files, check_input, read_manifest
from megatron_m3.retrieval.embedder import Embedder, load_embedder

KIND, SCHEMA = "index", 1
FILE, EMBEDDER = "index.faiss", "embedder"
NEVER_FOUND = "never_found.npy"
"""Ids whose vectors are 0, deleted references among them; there only where there are some."""
FOUND_AT_ONCE = 1 << 22
"""Candidates of all vectors that one search gives, where no single vector has more."""
ASKED_AT_ONCE = 1 << 14
"""Candidates that a filter judges in one call, where no single vector has more."""
MISSING = np.iinfo(np.int64).min
"""Stands where ``valid`` is false; no reference has it, and indexing with it fails."""


class Found(NamedTuple):
    """References by falling score, [N, k] each."""

    scores: np.ndarray
    """float32; 0 where missing."""
    ids: np.ndarray
    """int64."""
    valid: np.ndarray
    """bool; false where there was none."""


class VectorIndex:
    """Finds the references nearest to a vector. Threads follow OMP_NUM_THREADS."""

    def __init__(self, folder: Path, manifest: Manifest, faiss_index: Any) -> None:
        self.folder, self.manifest, self.hash, self.faiss_index = folder, manifest, manifest.hash, faiss_index
        has_some = NEVER_FOUND in manifest.files
        self.never_found = np.load(folder / NEVER_FOUND) if has_some else np.zeros(0, np.int64)

    @classmethod
    def open(cls, folder: str | Path, *, references_hash: str | None = None, check: bool = False) -> Self:
        """Open a folder made by ``m3 data index``.

        The index is read once more to compare its checksum, 1-2 s a GB; ``check`` does that for the embedder too,
        which else waits for :meth:`embedder`.

        Raises:
            ArtifactError: not an index folder, a damaged one, or one of other references.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, KIND, SCHEMA)
        check_files(folder, manifest, checksums=check or {FILE, NEVER_FOUND})
        if references_hash is not None:
            check_input(folder, manifest, "references", references_hash)
        return cls(folder, manifest, read_faiss(folder / FILE))

    def __len__(self) -> int:
        return int(self.faiss_index.ntotal)

    def embedder(self) -> Embedder:
        """The embedder whose vectors the index holds."""
        return load_embedder(self.folder / EMBEDDER)

    def search(self, vectors: np.ndarray, k: int) -> Found:
        """The ``k`` nearest references of each vector, float32 [N, size]. Zero vectors neither find nor are found."""
        if len(self.never_found):
            return self.search_filtered(vectors, k, lambda rows, ids: np.zeros(len(ids), bool))
        return self._search(vectors, k)

    def _search(self, vectors: np.ndarray, k: int) -> Found:
        scores, ids = self.faiss_index.search(np.ascontiguousarray(vectors, np.float32), k)
        order = np.lexsort((ids, -scores))
        scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
        valid = (ids >= 0) & vectors.any(axis=1)[:, None]
        return Found(np.where(valid, scores, 0).astype(np.float32), np.where(valid, ids, MISSING), valid)

    def search_filtered(
        self, vectors: np.ndarray, k: int, drop: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> Found:
        """:meth:`search` for the ``k`` nearest references that ``drop`` lets pass; looks further until it has them.

        Args:
            vectors: float32 [N, size].
            k: references wanted.
            drop: from rows [M], ascending, and the ids [M] of a next candidate of each, by falling score in a row, to
                bool [M]: drop it? A candidate may be asked about twice.
        """
        rows, fetch = np.arange(len(vectors)), min(2 * k + 4, len(self))
        result = Found(np.zeros((len(vectors), k), np.float32), np.full((len(vectors), k), MISSING),
                       np.zeros((len(vectors), k), bool))
        while len(rows):
            size, again = max(1, FOUND_AT_ONCE // fetch), []
            for part in (rows[first : first + size] for first in range(0, len(rows), size)):
                found = self._search(vectors[part], fetch)
                kept = found.valid & ~_is_among(found.ids, self.never_found)
                self._drop(part, found.ids, kept, drop)
                place = kept.cumsum(axis=1) - 1
                good = kept & (place < k)
                target = np.repeat(part, good.sum(axis=1)), place[good]
                result.scores[target], result.ids[target] = found.scores[good], found.ids[good]
                result.valid[target] = True
                again.append(part[(kept.sum(axis=1) < k) & found.valid.all(axis=1)])
            if fetch == len(self):
                break
            rows, fetch = np.concatenate(again), min(4 * fetch, len(self))
        return result

    @staticmethod
    def _drop(
        rows: np.ndarray, ids: np.ndarray, kept: np.ndarray, drop: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> None:
        """Take from ``kept`` what is dropped, bool [rows, candidates]."""
        size = max(1, ASKED_AT_ONCE // ids.shape[1])
        for part in (slice(first, first + size) for first in range(0, len(rows), size)):
            asked = kept[part]
            kept[part][asked] = ~drop(np.repeat(rows[part], asked.sum(axis=1)), ids[part][asked])


def _is_among(ids: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Which of ``ids`` are in a list, bool."""
    if not len(ascending):
        return np.zeros(ids.shape, bool)
    found: np.ndarray = ascending[np.searchsorted(ascending, ids).clip(max=len(ascending) - 1)] == ids
    return found


def read_faiss(path: Path) -> Any:
    """Open a FAISS index file, mapped where FAISS can: processes of a machine share its memory.

    Raises:
        ArtifactError: FAISS cannot read it.
    """
    import faiss

    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError:
        raise ArtifactError(f"{path}: not an index that FAISS can read; make the index again") from None
