"""m3 data collect: raw files to blocks of documents, by any number of jobs at once; nothing is lost without a line.

A block is some of the input: small files together, a piece of a large plain file, or one large compressed, parquet or
WARC file. Run the same command anywhere, as often as wanted: the jobs share the blocks that are missing. The output
(see docs/data.md) is read by every other data job as its input. What cannot be used stands in `dropped/`, with its
file, line and reason; a damaged file gives what can be read of it.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_tools.document_store import KIND, SCHEMA, DocumentFolder, show
from data_tools.documents import BadRecordError, find_files, read_file
from data_tools.shared_work import Workers
from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, DataError, exit_on_user_error
from megatron_m3.manifest import BlockFolder, check_files, hash_json, read_manifest

PLAIN = (".jsonl", ".json", ".txt")
"""Types of file that can be cut into pieces."""
COLUMNS = ("id", "text", "place")
ROWS = 512
"""Documents that are handed to the writer at a time."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    input: tuple[str, ...]
    """Files or folders (JSONL, txt, also .gz and .zst; parquet; WARC and WET), separated by commas."""
    output: str
    """Folder to write."""
    block_megabytes: int = 64
    """Input in a block, in MiB; a compressed, parquet or WARC file is never divided."""
    workers: int = 1
    """Processes here; more jobs of the same command, on any machine, share the blocks too."""

    def __post_init__(self) -> None:
        if self.block_megabytes < 1:
            raise ConfigError(f"block_megabytes={self.block_megabytes}: must be at least 1")


class Piece(NamedTuple):
    """Some of a file; bytes, moved on to where a record begins."""

    path: Path
    start: int
    stop: int | None
    """None for the whole file."""


def run(options: Options) -> None:
    """Write the blocks that are missing, then the manifest."""
    files, output = find_files(options.input), Path(options.output)
    sizes = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    settings = {"block_megabytes": options.block_megabytes}
    job = {"kind": KIND, "schema": SCHEMA, "files": sizes, "settings": settings}
    if (output / "manifest.json").exists() and BlockFolder.is_begun(output, job):
        check_files(output, read_manifest(output, KIND, SCHEMA))
        print(f"{output}: made already")
        return
    plan = list(make_plan(files, options.block_megabytes << 20))
    folder = DocumentFolder(output, job)
    with Workers(options.workers) as workers:
        sizes_of_blocks = [sum((piece.stop or piece.path.stat().st_size) - piece.start for piece in pieces)
                           for pieces in plan]
        workers.run("collecting", folder, sizes_of_blocks, "bytes", functools.partial(write_block, folder, plan))
    blocks = list(folder.info(len(plan)))
    if not any(block["documents"] for block in blocks):
        reasons = sorted({reason for block in blocks for reason in block["reasons"]})
        raise DataError(f"{','.join(options.input)}: no usable document ({', '.join(reasons) or 'empty files'}); "
                        f"mend the input and remove {output}")
    inputs = {"corpus": hash_json([block["sha256"] for block in blocks])}
    counts = folder.finish(len(plan), inputs, settings, {"files": len(files)})
    show("collected", output, counts)


def make_plan(files: Sequence[Path], block_bytes: int) -> Iterator[list[Piece]]:
    """The pieces of each block; depends on names and sizes of the files alone."""
    block: list[Piece] = []
    filled = 0
    for path in files:
        size = path.stat().st_size
        cuts = [*range(0, size, block_bytes)] if path.name.endswith(PLAIN) and size > block_bytes else [0]
        for start in cuts:
            stop = min(start + block_bytes, size) if len(cuts) > 1 else None
            length = (stop or size) - start
            if block and filled + length > block_bytes:
                yield block
                block, filled = [], 0
            block.append(Piece(path, start, stop))
            filled += length
    if block:
        yield block


def find_record(path: Path, offset: int) -> int:
    """Where the first record at or after byte ``offset`` of a plain file begins."""
    if offset == 0:
        return 0
    with path.open("rb") as stream:
        stream.seek(offset - 1)
        stream.readline()
        while path.suffix == ".txt" and stream.readline().strip():  # to the blank line that ends the document
            pass
        return stream.tell()


def write_block(folder: DocumentFolder, plan: Sequence[Sequence[Piece]], index: int) -> None:
    """Write one block: the documents of its pieces, and the hash of what was read."""
    digest = hashlib.sha256()
    with folder.block(index, COLUMNS) as writer:
        for piece in plan[index]:
            start = find_record(piece.path, piece.start)
            stop = None if piece.stop is None else find_record(piece.path, piece.stop)
            if stop is not None and start >= stop:
                continue
            add_bytes(digest, piece.path, start, stop)
            name = f"{piece.path.name}@{start}" if start else piece.path.name
            rows, line = [], 0
            try:
                for line, found, _ in read_file(piece.path, start, stop):
                    place = f"{name}:{line}"
                    if isinstance(found, BadRecordError):
                        writer.drop(str(found), file=str(piece.path), place=place)
                        continue
                    rows.append((*found, place))
                    if len(rows) == ROWS:
                        writer.write_rows(rows)
                        rows = []
            except DataError as error:
                writer.drop("file damaged from here on", file=str(piece.path), place=f"{name}:{line}", error=str(error))
            writer.write_rows(rows)
        writer.extra["sha256"] = digest.hexdigest()


def add_bytes(digest: "hashlib._Hash", path: Path, start: int, stop: int | None) -> None:
    """Add bytes ``start`` to ``stop`` of a file to a digest."""
    left = (path.stat().st_size if stop is None else stop) - start
    with path.open("rb") as stream:
        stream.seek(start)
        while left > 0 and (data := stream.read(min(left, 1 << 20))):
            digest.update(data)
            left -= len(data)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data collect``."""
    run(parse(Options, argv, "m3 data collect", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
