"""Rows made of the documents of a corpus, block by block, by any number of processes, for a job that then joins them.

A block is some of the corpus, by bytes; its rows are one Arrow file, written and read a batch at a time, so that memory
grows neither with the corpus nor with a file that cannot be divided. Rows and their order depend on the corpus alone.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools.documents import BATCH, SKIPPED, Corpus
from data_tools.records import Document
from data_tools.shared_work import STAGES, Workers
from megatron_m3.errors import ArtifactError
from megatron_m3.manifest import BlockFolder, atomic_path

if TYPE_CHECKING:
    import pyarrow

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
        settings = {"kind": f"{job['kind']}, rows", "block_bytes": block_bytes}
        self.folder = RowFolder(output / STAGES / "rows", dict(job) | settings)

    def make(self, label: str, workers: Workers) -> None:
        """Make the blocks that are missing, and give the corpus their account."""
        sizes = [sum(piece.size for piece in pieces) for pieces in self.plan]
        workers.run(label, self.folder, sizes, "bytes", self.write)
        infos = list(self.folder.info(len(self.plan)))
        self._firsts = np.cumsum([0, *(info["rows"] for info in infos)])
        self.corpus.documents = sum(info["documents"] for info in infos)
        self.corpus.skipped = [json.loads(line) for index in range(len(self.plan))
                               for line in self._skipped(index).read_text().splitlines()]

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def write(self, index: int) -> None:
        """Write the rows of a block, and what was left out of its documents."""
        from pyarrow import ipc

        if (self.output / "manifest.json").exists():
            raise ArtifactError(f"{self.output}: another process has finished it")
        part, rows, info = self.corpus.part(self.plan[index]), 0, dict[str, Any]()
        with self.folder.writing(index, info) as path:
            with path.open("wb") as sink, ipc.new_file(sink, self.schema) as writer:
                for batch in self._make(itertools.batched(part, BATCH)):
                    writer.write_batch(batch)
                    rows += len(batch)
            with atomic_path(self._skipped(index)) as skipped:
                skipped.write_text("".join(json.dumps(entry) + "\n" for entry in part.skipped))
            info |= {"documents": part.documents, "rows": rows}

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

    def _open(self, index: int) -> "pyarrow.Table":
        import pyarrow
        from pyarrow import ipc

        return ipc.open_file(pyarrow.memory_map(str(self.folder.folder / self.folder.name(index)))).read_all()

    def _skipped(self, index: int) -> Path:
        return self.folder.folder / f"{index:06d}_{SKIPPED}"


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
