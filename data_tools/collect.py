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

from data_tools.document_store import KIND, SCHEMA, BlockWriter, DocumentFolder, show
from data_tools.documents import find_files
from data_tools.pieces import make_plan, parts_of_names, read_bytes, settle
from data_tools.records import BadRecordError, Piece, in_batches, read_records
from data_tools.shared_work import Workers
from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, DataError, exit_on_user_error
from megatron_m3.manifest import BlockFolder, check_files, hash_json, read_manifest

COLUMNS = ("id", "text", "place")


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
        for name in ("block_megabytes", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")


def run(options: Options) -> None:
    """Write the blocks that are missing, then the manifest."""
    files, output = find_files(options.input), Path(options.output)
    parts = parts_of_names(files)
    sizes = [(Piece(path, parts=parts).name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    settings = {"block_megabytes": options.block_megabytes}
    job = {"kind": KIND, "schema": SCHEMA, "files": sizes, "settings": settings}
    if (output / "manifest.json").exists() and BlockFolder.is_begun(output, job):
        check_files(output, read_manifest(output, KIND, SCHEMA))
        print(f"{output}: made already")
        return
    plan = list(make_plan(files, options.block_megabytes << 20))
    folder = DocumentFolder(output, job)
    with Workers(options.workers) as workers:
        sizes_of_blocks = [sum(piece.size for piece in pieces) for pieces in plan]
        workers.run("collecting", folder, sizes_of_blocks, "bytes", functools.partial(write_block, folder, plan))
    blocks = list(folder.info(len(plan)))
    if not any(block["documents"] for block in blocks):
        reasons = sorted({reason for block in blocks for reason in block["reasons"]})
        raise DataError(f"{','.join(options.input)}: no usable document ({', '.join(reasons) or 'empty files'}); "
                        f"mend the input and remove {output}")
    inputs = {"corpus": hash_json([block["sha256"] for block in blocks])}
    counts = folder.finish(len(plan), inputs, settings, {"files": len(files)})
    show("collected", output, counts)


def write_block(folder: DocumentFolder, plan: Sequence[Sequence[Piece]], index: int) -> None:
    """Write one block: the documents of its pieces, and the hash of what was read."""
    digest, pieces = hashlib.sha256(), list(filter(None, map(settle, plan[index])))
    for piece in pieces:
        for data in read_bytes(piece.path, piece.start, piece.start + piece.size):
            digest.update(data)
    with folder.block(index, COLUMNS) as writer:
        for rows in in_batches(row for piece in pieces for row in read_rows(piece, writer)):
            writer.write_rows(rows)
        writer.extra["sha256"] = digest.hexdigest()


def read_rows(piece: Piece, writer: BlockWriter) -> Iterator[tuple[str, str, str]]:
    """The columns of each document of a piece; what cannot be used is listed as dropped."""
    line, name = 0, piece.name
    try:
        for line, found, _ in read_records(piece):
            if isinstance(found, BadRecordError):
                writer.drop(str(found), file=str(piece.path), place=f"{name}:{line}")
            else:
                yield *found, f"{name}:{line}"
    except DataError as error:
        writer.drop("file damaged from here on", file=str(piece.path), place=f"{name}:{line}", error=str(error))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data collect``."""
    run(parse(Options, argv, "m3 data collect", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
