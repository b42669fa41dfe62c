"""m3 data references: cut documents into references of at most 128 tokens, the knowledge base.

References end at sentence ends where possible; a document that fits is one reference; nothing is cut off silently.
With --select only some documents are cut. Any number of jobs may run the same command at once: they share the blocks of
the corpus, then those of the references.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_tools.corpus_rows import Batches, CorpusRows, flat, token_rows
from data_tools.documents import Corpus, show_counts
from data_tools.selection import Select, Selection
from data_tools.shared_work import STAGES, Workers, clear_refused, is_made, stages
from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, exit_on_user_error
from megatron_m3.manifest import BlockFolder, Manifest, write_manifest

if TYPE_CHECKING:
    import numpy as np
    import pyarrow

    from megatron_m3.tokenizer import Tokenizer

MAX_LENGTH = 1 << 16
"""Longest reference: every one takes as much room on disk."""
ROWS = 4096
"""References that are handed to the writer at a time."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    input: tuple[str, ...]
    """Documents that other steps wrote, or files and folders as `m3 data collect` reads, separated by commas."""
    tokenizer: str
    """Folder of the tokenizer, made by `m3 data tokenizer`."""
    output: str
    """Folder to write."""
    select: Select = field(default_factory=Select)
    reference_length: int = 128
    """Most tokens in a reference."""
    block_size: int = 16384
    """References in a block file."""
    block_megabytes: int = 64
    """Corpus in a block of the work, in MiB; the output does not depend on it."""
    workers: int = 1
    """Processes here; more jobs of the same command, on any machine, share the blocks too."""

    def __post_init__(self) -> None:
        if self.reference_length < 8:
            raise ConfigError(f"reference_length={self.reference_length}: must be at least 8")
        if self.reference_length > MAX_LENGTH:
            raise ConfigError(f"reference_length={self.reference_length}: must be at most {MAX_LENGTH:,}")
        for name in ("block_size", "block_megabytes", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")


def run(options: Options) -> None:
    """Do what is missing; nothing is done when the output is there already, made from the same inputs."""
    from megatron_m3.references.store import KIND, SCHEMA
    from megatron_m3.tokenizer import Tokenizer

    corpus, output, tokenizer = Corpus(options.input), Path(options.output), Tokenizer.load(options.tokenizer)
    inputs = {"corpus": corpus.hash, "tokenizer": tokenizer.hash} | options.select.inputs()
    settings = {"reference_length": options.reference_length, "block_size": options.block_size}
    settings |= options.select.settings()
    is_there = functools.partial(is_made, output, KIND, SCHEMA, inputs, settings)
    if is_there():
        print(f"{output}: made already")
        return
    corpus.check()
    job = {"kind": KIND, "schema": SCHEMA, "inputs": inputs, "settings": settings}
    with clear_refused(output), stages(output / STAGES, is_there):
        counts, files = write_references(corpus, tokenizer, output, job, options)
        corpus.write_account(output, counts)
        info = counts | {"corpus": corpus.file_hashes}
        write_manifest(output, Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings=settings, files=files,
                                        info=info))
        show_counts("references", counts)
    print(output)


class Reference(NamedTuple):
    """One reference."""

    text: str
    tokens: list[int]
    document_id: str
    first_token: int
    """Where in its document it begins, in tokens."""


def write_references(
    corpus: Corpus, tokenizer: "Tokenizer", output: Path, job: dict[str, Any], options: Options
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cut the documents, then write the blocks; return the counts, and bytes and hash of each block.

    Raises:
        ConfigError: no document is selected.
    """
    import pyarrow

    from megatron_m3.references import token_dtype

    dtype = token_dtype(tokenizer.vocab_size)
    schema = pyarrow.schema({"text": pyarrow.large_string(), "document": pyarrow.large_string(),
                             "tokens": pyarrow.large_list(pyarrow.from_numpy_dtype(dtype)),
                             "first_token": pyarrow.int64()})
    folder = BlockFolder(output, job)
    make = functools.partial(make_rows, tokenizer, options.reference_length, schema, dtype)
    selection = corpus.selection = Selection(options.select, output, job) if options.select.chooses else None
    rows = CorpusRows(corpus, output, job, options.block_megabytes << 20, schema, make)
    with Workers(options.workers) as workers:
        if selection:
            selection.prepare(workers)
        rows.make("cutting references", workers)
        selected = selection.finish(corpus, rows.places()) if selection else {}
        sizes = [min(options.block_size, len(rows) - start) for start in range(0, len(rows), options.block_size)]
        write = functools.partial(write_block, folder, rows, options)
        workers.run("writing references", folder, sizes, "references", write)
    return corpus.counts(**selected, references=sum(sizes), blocks=len(sizes)), folder.files(len(sizes))


def make_rows(
    tokenizer: "Tokenizer", limit: int, schema: "pyarrow.Schema", dtype: "type[np.generic]", batches: Batches
) -> Iterator["pyarrow.RecordBatch"]:
    """The references of documents as rows."""
    import pyarrow

    for some in itertools.batched(find_references(batches, tokenizer, limit), ROWS):
        texts, tokens, documents, first_tokens = zip(*some, strict=True)
        yield pyarrow.record_batch([
            pyarrow.array(texts, pyarrow.large_string()), pyarrow.array(documents, pyarrow.large_string()),
            token_rows(tokens, dtype), pyarrow.array(first_tokens, pyarrow.int64())], schema=schema)


def write_block(folder: BlockFolder, rows: CorpusRows, options: Options, index: int) -> None:
    """Write a block of references."""
    from megatron_m3.references import pack_block

    found = rows.read(index * options.block_size, min(len(rows), (index + 1) * options.block_size))
    columns = {name: found.column(name).combine_chunks() for name in found.column_names}
    arrays = pack_block(flat(columns["tokens"]), flat(columns["text"]), flat(columns["document"]),
                        columns["first_token"].to_numpy(), options.reference_length)
    folder.write(index, arrays, {"references": len(found)})


def find_references(batches: Batches, tokenizer: "Tokenizer", limit: int) -> Iterator[Reference]:
    """All references of documents, in order."""
    from megatron_m3.references import split_text

    for batch in batches:
        encodings = tokenizer.encodings([document.text for document in batch])
        for document, encoding in zip(batch, encodings, strict=True):
            for piece in split_text(tokenizer, document.text, limit, encoding):
                if piece.tokens:
                    yield Reference(piece.text, piece.tokens, document.id, piece.first_token)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data references``."""
    run(parse(Options, argv, "m3 data references", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
