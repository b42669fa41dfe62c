"""m3 data tokenize: documents to a Megatron indexed dataset, `tokens.bin` and `tokens.idx`, EOS after each document.

Beside them lie `documents.jsonl` (the id of each document, in order), `counts.json` and a manifest. Any number of jobs
may run the same command at once: they share the blocks of the corpus, then one of them joins what they made.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools.corpus_rows import Batches, CorpusRows, flat, token_rows
from data_tools.documents import Corpus, show_counts
from data_tools.shared_work import STAGES, Workers, is_made, stages
from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, exit_on_user_error
from megatron_m3.manifest import (
    BlockFolder,
    Manifest,
    atomic_path,
    clear_half_written,
    hash_file,
    write_manifest,
)

if TYPE_CHECKING:
    import pyarrow

    from megatron_m3.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    input: tuple[str, ...]
    """Documents that other steps wrote, or files and folders as `m3 data collect` reads, separated by commas."""
    tokenizer: str
    """Folder of the tokenizer, made by `m3 data tokenizer`."""
    output: str
    """Folder to write."""
    block_megabytes: int = 64
    """Corpus in a block of the work, in MiB; the output does not depend on it."""
    workers: int = 1
    """Processes here; more jobs of the same command, on any machine, share the blocks too."""

    def __post_init__(self) -> None:
        for name in ("block_megabytes", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")


def run(options: Options) -> None:
    """Do what is missing; nothing is done when the output is there already, made from the same inputs."""
    from megatron_m3.data.tokens import KIND, SCHEMA
    from megatron_m3.tokenizer import Tokenizer

    corpus, output, tokenizer = Corpus(options.input), Path(options.output), Tokenizer.load(options.tokenizer)
    inputs = {"corpus": corpus.hash, "tokenizer": tokenizer.hash}
    is_there = functools.partial(is_made, output, KIND, SCHEMA, inputs, {})
    if is_there():
        print(f"{output}: made already")
        return
    corpus.check()
    job = {"kind": KIND, "schema": SCHEMA, "inputs": inputs}
    with stages(output / STAGES, is_there):
        counts, files = write_tokens(corpus, tokenizer, output, job, options)
        corpus.write_account(output, counts)
        info = counts | {"corpus": corpus.file_hashes}
        write_manifest(output, Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings={}, files=files, info=info))
        show_counts("tokens", counts)
    print(output)


def write_tokens(
    corpus: Corpus, tokenizer: "Tokenizer", output: Path, job: dict[str, Any], options: Options
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tokenize and join; return the counts, and bytes and hash of each file."""
    import pyarrow

    from megatron_m3.references import token_dtype

    dtype = token_dtype(tokenizer.vocab_size)
    schema = pyarrow.schema({"line": pyarrow.large_string(),
                             "tokens": pyarrow.large_list(pyarrow.from_numpy_dtype(dtype))})
    BlockFolder(output, job)
    make = functools.partial(make_rows, tokenizer, schema, dtype)
    rows = CorpusRows(corpus, output, job, options.block_megabytes << 20, schema, make)
    joined = BlockFolder(output / STAGES / "joined", job | {"kind": "tokens, joined"})
    with Workers(options.workers) as workers:
        rows.make("tokenizing", workers)
        workers.run("joining", joined, [1], "dataset", functools.partial(join, joined, rows, tokenizer.vocab_size))
    info = joined.read_info(0)
    return corpus.counts(tokens=info["tokens"], longest_document=info["longest"]), info["files"]


def make_rows(
    tokenizer: "Tokenizer", schema: "pyarrow.Schema", dtype: type[np.generic], batches: Batches
) -> Iterator["pyarrow.RecordBatch"]:
    """The line of each document in the file of ids, and its tokens."""
    import pyarrow

    for batch in batches:
        encoded = tokenizer.encode_batch([document.text for document in batch])
        for tokens in encoded:
            tokens.append(tokenizer.eos_id)
        lines = [json.dumps({"id": document.id}) + "\n" for document in batch]
        yield pyarrow.record_batch([pyarrow.array(lines, pyarrow.large_string()), token_rows(encoded, dtype)],
                                   schema=schema)


def join(joined: BlockFolder, rows: CorpusRows, vocab_size: int, index: int) -> None:
    """Write the indexed dataset and the file of ids, and note their counts and hashes as block ``index``."""
    from megatron_m3.platform import select

    select()  # before anything of megatron.core is imported
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from megatron_m3.data.tokens import IDS, TOKENS

    dtype, lengths = DType.optimal_dtype(vocab_size), []
    names = (*TOKENS, IDS)
    clear_half_written(rows.output, names)
    with contextlib.ExitStack() as stack:
        tokens_path, index_path, ids_path = (stack.enter_context(atomic_path(rows.output / name)) for name in names)
        builder = IndexedDatasetBuilder(str(tokens_path), dtype=dtype)
        with ids_path.open("wb") as ids:
            for batch in rows.batches():
                tokens, counts = flat(batch.column("tokens"))
                builder.data_file.write(tokens.astype(dtype, copy=False).data)
                ids.write(flat(batch.column("line"))[0].data)
                lengths.append(counts)
        builder.sequence_lengths = np.concatenate(lengths)
        builder.document_indices = np.arange(len(builder.sequence_lengths) + 1)
        builder.finalize(str(index_path))
    made = builder.sequence_lengths
    joined.write_bytes(index, b"", {"tokens": int(made.sum()), "longest": int(made.max()),
                                    "files": {name: hash_file(rows.output / name) for name in sorted(names)}})


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data tokenize``."""
    run(parse(Options, argv, "m3 data tokenize", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
