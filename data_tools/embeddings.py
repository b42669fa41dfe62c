"""The vectors of the references, as ``m3 data embed`` wrote them, block by block."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_m3.manifest import block_name, check_files, check_input, map_block, read_manifest

if TYPE_CHECKING:
    import numpy as np


class Embeddings:
    """The vectors that ``m3 data embed`` wrote, memory-mapped."""

    def __init__(self, folder: Path, references_hash: str) -> None:
        """Open an embeddings folder.

        Raises:
            ArtifactError: not an embeddings folder, a damaged one, or one of other references.
        """
        from data_tools.embed import KIND, SCHEMA

        self.manifest = read_manifest(folder, KIND, SCHEMA)
        check_files(folder, self.manifest)
        check_input(folder, self.manifest, "references", references_hash)
        self.folder, self.hash = folder, self.manifest.hash
        self.size: int = self.manifest.info["size"]
        self.count: int = self.manifest.info["references"]

    def blocks(self) -> Iterator["np.ndarray"]:
        """The vectors, float32 [N, size], block after block."""
        for index in range(len(self.manifest.files)):
            yield self.block(index)

    def block(self, index: int, *, check: bool = False) -> "np.ndarray":
        """The vectors of a block, float32 [N, size]; ``check`` compares its checksum first.

        Raises:
            ArtifactError: the block is not what was written.
        """
        if check:
            check_files(self.folder, self.manifest, checksums=True, names=[block_name(index)])
        return map_block(self.folder / block_name(index))["vectors"]

    def rows(self, ids: "np.ndarray") -> "np.ndarray":
        """The vectors of ``ids`` [N], float32 [N, size]."""
        import numpy as np

        vectors, first = np.empty((len(ids), self.size), np.float32), 0
        for block in self.blocks():
            here = (ids >= first) & (ids < first + len(block))
            vectors[here] = block[ids[here] - first]
            first += len(block)
        return vectors

    @cached_property
    def sizes(self) -> list[int]:
        """Vectors in each block."""
        return [len(block) for block in self.blocks()]

    def sample(self, count: int) -> "np.ndarray":
        """``count`` vectors evenly spaced over all, or all if there are fewer."""
        import numpy as np

        return self.rows(np.linspace(0, self.count - 1, min(count, self.count)).astype(np.int64))
