"""Each chunk's neighbours: the references that its own text retrieved, best first, keyed by (document, chunk).

Document ``d`` is row ``d % documents_per_block`` of block ``d // documents_per_block``. Arrays of a block of n
documents with c chunks in all: ``chunk_offsets`` int64 [n + 1]; ``ids`` int64, ``valid`` bool, ``scores`` and
``overlaps`` float32, each [c, k].
"""

from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from megatron_m3.manifest import BlockReader, Manifest, check_files, check_input, read_manifest

KIND, SCHEMA = "neighbours", 1


class Rows(NamedTuple):
    """Neighbours of a document's chunks, [chunks, k] each; where ``valid`` is false there is none."""

    ids: np.ndarray
    valid: np.ndarray
    scores: np.ndarray


class NeighbourStore:
    """Reads a folder made by ``m3 data neighbours``."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest, self.hash = folder, manifest, manifest.hash
        self.chunk_length: int = manifest.settings["chunk_length"]
        self.documents_per_block: int = manifest.settings["documents_per_block"]
        self._blocks = BlockReader(folder, manifest)

    @classmethod
    def open(cls, folder: str | Path, *, check: bool = False, **inputs: str) -> Self:
        """Open the folder; ``check`` verifies every checksum now, else each block's when it is first used.

        Args:
            folder: the neighbours.
            check: whether to read and verify all files.
            inputs: hashes of the ``tokens``, ``references`` and ``tokenizer`` that it must have been made from.

        Raises:
            ArtifactError: not such a folder, a damaged one, or one made from something else.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, KIND, SCHEMA)
        for role, actual in inputs.items():
            check_input(folder, manifest, role, actual)
        check_files(folder, manifest, checksums=check)
        return cls(folder, manifest)

    def rows(self, document: int) -> Rows:
        """Neighbours of every chunk of one document."""
        block = self._blocks[document // self.documents_per_block]
        row = document % self.documents_per_block
        chunks = slice(*block["chunk_offsets"][row : row + 2])
        return Rows(block["ids"][chunks], block["valid"][chunks], block["scores"][chunks])
