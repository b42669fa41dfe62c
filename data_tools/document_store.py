"""The documents artifact: parquet blocks of documents that the steps from raw text to training text hand on.

Parquet, since it is compressed and read in parts, carries further columns along, and can be read by any tool of the
field. A block's columns are `id`, `text`, `place` (where it was collected: FILE:LINE) and
what later steps add. What a step leaves out is listed in `dropped/`, a JSON line each, in files as the blocks are.
"""

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from data_tools import shared_work
from data_tools.documents import show_counts
from megatron_m3.errors import ArtifactError
from megatron_m3.manifest import (
    BlockFolder,
    Manifest,
    atomic_path,
    check_files,
    clear_half_written,
    read_manifest,
    write_manifest,
)

if TYPE_CHECKING:
    import pyarrow

KIND, SCHEMA = "documents", 1
DROPPED = "dropped"
BATCH_ROWS = 1024
GROUP_BYTES = 16 << 20
"""Text in a row group: what a reader holds at a time."""


def dropped_name(index: int) -> str:
    """File name of the list of what block ``index`` left out."""
    return f"block_{index:06d}.jsonl"


class DocumentFolder(BlockFolder):
    """Documents being written, block by block."""

    def name(self, index: int) -> str:
        """File name of block ``index``."""
        return f"block_{index:06d}.parquet"

    @contextlib.contextmanager
    def block(self, index: int, columns: Sequence[str]) -> Iterator["BlockWriter"]:
        """A writer of block ``index``; the block, its record and its list of drops are there when the `with` ends."""
        info: dict[str, Any] = {}
        with self.writing(index, info) as path:
            with (atomic_path(self.folder / DROPPED / dropped_name(index)) as aside,
                  aside.open("w", encoding="utf-8", errors="backslashreplace") as dropped):  # names of files may be any
                writer = BlockWriter(path, columns, dropped)
                yield writer
                writer.close()
            info |= writer.info()

    def clear_half_written(self, num_blocks: int) -> None:
        """See :class:`BlockFolder`; the lists of drops too."""
        super().clear_half_written(num_blocks)
        clear_half_written(self.folder / DROPPED, set(map(dropped_name, range(num_blocks))))

    def finish(
        self, num_blocks: int, inputs: dict[str, str], settings: dict[str, Any], more: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write ``counts.json`` and the manifest; return the counts: came in, kept, dropped, and why."""
        blocks = list(self.info(num_blocks))
        reasons = sum((Counter(block["reasons"]) for block in blocks), Counter[str]())
        kept, dropped = sum(block["documents"] for block in blocks), reasons.total()
        counts = {"came in": kept + dropped, "documents": kept, "dropped": dropped,
                  "reasons": dict(sorted(reasons.items())), "characters": sum(block["characters"] for block in blocks)}
        with atomic_path(self.folder / "counts.json") as path:
            path.write_text(json.dumps(counts | dict(more or {}), indent=1, ensure_ascii=False) + "\n")
        info = counts | {"block_documents": [block["documents"] for block in blocks]}
        manifest = Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings=settings, files=self.files(num_blocks),
                            info=info)
        write_manifest(self.folder, manifest)
        return counts


class BlockWriter:
    """Rows of one block, written as they come."""

    def __init__(self, path: Path, columns: Sequence[str], dropped: IO[str]) -> None:
        """``dropped`` gets a line for each document that is left out."""
        import pyarrow
        from pyarrow import parquet

        self.schema = pyarrow.schema([(name, pyarrow.large_string()) for name in columns])
        self._dropped, self._reasons = dropped, Counter[str]()
        self.extra: dict[str, Any] = {}
        """More for the record of the block."""
        self._documents = self._characters = self._bytes = 0
        self._rows: list[pyarrow.RecordBatch] = []
        self._file = parquet.ParquetWriter(path, self.schema, compression="zstd", compression_level=3,
                                           use_dictionary=False)  # texts and ids are all different

    def write(self, batch: "pyarrow.RecordBatch") -> None:
        """Add documents: a batch with the block's columns."""
        from pyarrow import compute

        if len(batch):
            self._rows.append(batch)
            self._documents += len(batch)
            self._characters += compute.sum(compute.utf8_length(batch.column("text"))).as_py()
            self._bytes += batch.nbytes
        if self._bytes >= GROUP_BYTES:
            self._flush()

    def write_rows(self, rows: Sequence[tuple[str, ...]]) -> None:
        """Add documents: rows in the order of the columns."""
        import pyarrow

        if rows:
            self.write(pyarrow.record_batch([pyarrow.array(list(column), pyarrow.large_string())
                                             for column in zip(*rows, strict=True)], schema=self.schema))

    def drop(self, reason: str, **entry: Any) -> None:
        """List a document that is left out, and why."""
        self._reasons[reason] += 1
        self._dropped.write(json.dumps(entry | {"reason": reason}, ensure_ascii=False) + "\n")

    def _flush(self) -> None:
        import pyarrow

        if self._rows:
            self._file.write_table(pyarrow.Table.from_batches(self._rows, self.schema).combine_chunks(),
                                   row_group_size=1 << 30)
        self._rows, self._bytes = [], 0

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        self._file.close()

    def info(self) -> dict[str, Any]:
        """The counts of the block."""
        counts = {"documents": self._documents, "characters": self._characters}
        return counts | {"reasons": dict(sorted(self._reasons.items()))} | self.extra


class DocumentStore:
    """A finished documents artifact."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest, self.hash = folder, manifest, manifest.hash
        self.sizes: list[int] = manifest.info["block_documents"]
        """Documents in each block."""

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a folder that `m3 data collect`, `filter` or `deduplicate` made.

        Raises:
            ArtifactError: it is not one, or a file is missing or cut short.
        """
        path = Path(folder)
        if path.is_file() or (path.is_dir() and not (path / "manifest.json").exists()):
            raise ArtifactError(f"input={folder}: not a folder of documents; make one with `m3 data collect`")
        store = cls(path, read_manifest(path, KIND, SCHEMA))
        check_files(path, store.manifest)
        return store

    def name(self, index: int) -> str:
        """File name of block ``index``."""
        return f"block_{index:06d}.parquet"

    def columns(self) -> list[str]:
        """Names of the columns."""
        from pyarrow import parquet

        return list(parquet.read_schema(self.folder / self.name(0)).names)

    def batches(self, index: int) -> Iterator["pyarrow.RecordBatch"]:
        """The documents of block ``index``, at most 1,024 and a row group at a time; its checksum is compared first.

        Raises:
            ArtifactError: the block is not what was written.
        """
        from pyarrow import parquet

        check_files(self.folder, self.manifest, checksums=True, names=[self.name(index)])
        with parquet.ParquetFile(self.folder / self.name(index)) as file:
            for group in range(file.num_row_groups):
                yield from file.iter_batches(BATCH_ROWS, row_groups=[group], use_threads=False)

    def row(self, index: int, row: int) -> dict[str, Any]:
        """One document of block ``index``; only its row group is read."""
        from pyarrow import parquet

        with parquet.ParquetFile(self.folder / self.name(index)) as file:
            group = 0
            while row >= (rows := file.metadata.row_group(group).num_rows):
                row, group = row - rows, group + 1
        found: dict[str, Any] = _row_group(self.folder / self.name(index), group).slice(row, 1).to_pylist()[0]
        return found


@functools.lru_cache(4)
def _row_group(path: Path, group: int) -> "pyarrow.Table":
    from pyarrow import parquet

    return parquet.ParquetFile(path).read_row_group(group, use_threads=False)


def is_made(folder: Path, inputs: dict[str, str], settings: dict[str, Any]) -> bool:
    """Whether the documents of this job are there already; says so."""
    if not shared_work.is_made(folder, KIND, SCHEMA, inputs, settings):
        return False
    print(f"{folder}: made already")
    return True


def show(title: str, folder: Path, counts: dict[str, Any]) -> None:
    """The table of counts on stderr, the folder on stdout."""
    show_counts(title, counts)
    print(folder)
