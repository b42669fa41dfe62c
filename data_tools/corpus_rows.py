"""Rows made of the documents of a corpus, block by block, by any number of processes, for a job that then joins them.

A block is some of the corpus, by bytes; its rows are one Arrow file, written and read a batch at a time, so that memory
grows neither with the corpus nor with a file that cannot be divided. Rows and their order depend on the corpus alone.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools.documents import SKIPPED, Corpus, Skipped
from data_tools.records import Document, in_batches
from data_tools.shared_work import STAGES, Workers
from megatron_m3.errors import ArtifactError
from megatron_m3.manifest import BlockFolder, atomic_path, hash_file

if TYPE_CHECKING:
    import pyarrow

SCHEMA = 2
"""Version of the blocks and of what lies beside them."""
FOUND = "found.npy"
"""File beside a block: places of its documents in the list of a selection."""
type Batches = Iterable[tuple[Document, ...]]
type Make = Callable[[Batches], Iterable["pyarrow.RecordBatch"]]
"""Makes rows of documents; it can be pickled."""


class RowFolder(BlockFolder):
    """Blocks of rows."""

    def name(self, index: int) -> str:
        """File name of block ``index``."""
        return f"block_{index:06d}.arrow"


class CorpusRows:
    """The rows of a corpus; they can be read when all are made, and vanish with the job's other stages."""

    def __init__(
        self, corpus: Corpus, output: Path, job: Mapping[str, Any], block_bytes: int, schema: "pyarrow.Schema",
        make: Make
    ) -> None:
        """``output`` is the folder of the artifact that ``job`` makes, ``schema`` that of the rows."""
        self.corpus, self.output, self.schema, self._make = corpus, output, schema, make
        self.plan = corpus.plan(block_bytes)
        settings = {"kind": f"{job['kind']}, rows", "schema": SCHEMA, "block_bytes": block_bytes}
        self.folder = RowFolder(output / STAGES / "rows", dict(job) | settings)

    def make(self, label: str, workers: Workers) -> None:
        """Make the blocks that are missing, and give the corpus their account."""
        sizes = [sum(piece.size for piece in pieces) for pieces in self.plan]
        workers.run(label, self.folder, sizes, "bytes", self.write)
        infos = list(self.folder.info(len(self.plan)))
        self._firsts = np.cumsum([0, *(info["rows"] for info in infos)])
        self.corpus.documents = sum(info["documents"] for info in infos)
        self.corpus.selected = sum(info["selected"] for info in infos)
        self.corpus.skipped = SkippedInBlocks(self, infos)

    def places(self) -> Iterator[np.ndarray]:
        """Places of documents in the list of the corpus' selection, block by block."""
        for index in range(len(self.plan)):
            yield np.load(self.beside(index, FOUND))

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def write(self, index: int) -> None:
        """Write the rows of a block, and beside it what was left out of its documents."""
        from pyarrow import ipc

        if (self.output / "manifest.json").exists():
            raise ArtifactError(f"{self.output}: another process has finished it")
        rows, info = 0, dict[str, Any]()
        with self.folder.writing(index, info) as path:
            with atomic_path(self._path_beside(index, SKIPPED)) as aside, aside.open("w+") as stream:
                part = self.corpus.part(self.plan[index], stream)
                with path.open("wb") as sink, ipc.new_file(sink, self.schema) as writer:
                    for batch in self._make(in_batches(part)):
                        writer.write_batch(batch)
                        rows += len(batch)
            beside = [SKIPPED]
            if self.corpus.selection is not None:
                with atomic_path(self._path_beside(index, FOUND)) as aside, aside.open("wb") as found:
                    np.save(found, np.unique(np.concatenate([np.zeros(0, np.int64), *part.places])))
                beside.append(FOUND)
            info |= {"documents": part.documents, "selected": part.selected, "rows": rows,
                     "reasons": dict(part.skipped.reasons),
                     "beside": {name: hash_file(self._path_beside(index, name)) for name in beside}}

    def batches(self) -> Iterator["pyarrow.RecordBatch"]:
        """All rows, as they were made."""
        for index in range(len(self.plan)):
            yield from self._open(index).to_batches()

    def read(self, start: int, stop: int) -> "pyarrow.Table":
        """Rows ``start`` to ``stop``, as far as there are any; only they are read from disk."""
        import pyarrow

        first = int(np.searchsorted(self._firsts, start, side="right")) - 1
        last = int(np.searchsorted(self._firsts, stop))
        found = pyarrow.concat_tables(self._open(index) for index in range(first, min(last, len(self.plan))))
        return found.slice(start - self._firsts[first], stop - start)

    def beside(self, index: int, name: str) -> Path:
        """A file that was written beside a block, whose checksum is compared.

        Raises:
            ArtifactError: it is not what was written.
        """
        path, written = self._path_beside(index, name), self.folder.read_info(index)["beside"][name]
        if hash_file(path) != written:
            raise self.folder.damaged(index, path)
        return path

    def _open(self, index: int) -> "pyarrow.Table":
        import pyarrow
        from pyarrow import ipc

        return ipc.open_file(pyarrow.memory_map(str(self.folder.checked(index)))).read_all()

    def _path_beside(self, index: int, name: str) -> Path:
        return self.folder.folder / f"{index:06d}_{name}"


class SkippedInBlocks(Skipped):
    """What was set aside in all blocks, read from their files."""

    def __init__(self, rows: CorpusRows, infos: Iterable[Mapping[str, Any]]) -> None:
        super().__init__()
        self.rows = rows
        for info in infos:
            self.reasons.update(info["reasons"])

    def lines(self) -> Iterator[str]:
        """See :class:`Skipped`."""
        for index in range(len(self.rows.plan)):
            with self.rows.beside(index, SKIPPED).open() as stream:
                yield from stream


def token_rows(tokens: Sequence[list[int]], dtype: type[np.generic]) -> "pyarrow.LargeListArray":
    """A column of token ids from the ids of each row."""
    import pyarrow

    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    values = np.fromiter(itertools.chain.from_iterable(tokens), dtype, offsets[-1])
    return pyarrow.LargeListArray.from_arrays(offsets, values)


def flat(column: "pyarrow.Array") -> tuple[np.ndarray, np.ndarray]:
    """All token ids of a column, or the bytes of all its texts, and how many each row has; nothing is copied."""
    import pyarrow

    offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
    if pyarrow.types.is_large_list(column.type):
        return column.flatten().to_numpy(), np.diff(offsets)
    data = np.frombuffer(column.buffers()[2] or b"", np.uint8)
    return data[offsets[0] : offsets[-1]], np.diff(offsets)
