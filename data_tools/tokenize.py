"""m3 data tokenize: documents to a Megatron indexed dataset, `tokens.bin` and `tokens.idx`, EOS after each document.

Beside them lie `documents.jsonl` (the id of each document, in order), `counts.json` and a manifest.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.documents import Corpus, show_counts
from megatron_m3.config import parse
from megatron_m3.errors import exit_on_user_error
from megatron_m3.manifest import Manifest, atomic_folder, hash_file, is_finished, write_manifest

if TYPE_CHECKING:
    from megatron_m3.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    input: tuple[str, ...]
    """Corpus files or folders (JSONL, txt, parquet; JSONL and txt also .gz), separated by commas."""
    tokenizer: str
    """Folder of the tokenizer, made by `m3 data tokenizer`."""
    output: str
    """Folder to write; it must not exist, or be empty."""


def run(options: Options) -> None:
    """Tokenize the corpus; nothing is done when the output is there already, made from the same inputs."""
    from megatron_m3.data.tokens import KIND, SCHEMA
    from megatron_m3.tokenizer import Tokenizer

    corpus, output, tokenizer = Corpus(options.input), Path(options.output), Tokenizer.load(options.tokenizer)
    inputs = {"corpus": corpus.hash, "tokenizer": tokenizer.hash}
    if is_finished(output, KIND, SCHEMA, inputs, {}):
        print(f"{output}: made already")
        return
    corpus.check()
    with atomic_folder(output) as folder:
        counts = write_tokens(corpus, tokenizer, folder)
        files = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
        corpus.write_account(folder, counts)
        info = counts | {"corpus": corpus.file_hashes}
        write_manifest(folder, Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings={}, files=files, info=info))
    show_counts("tokens", counts)
    print(output)


def write_tokens(corpus: Corpus, tokenizer: "Tokenizer", folder: Path) -> dict[str, Any]:
    """Write the indexed dataset and the document ids into ``folder``; return the counts."""
    import numpy as np

    from megatron_m3.platform import select

    select()  # before anything of megatron.core is imported
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from megatron_m3.data.tokens import IDS, PREFIX

    builder = IndexedDatasetBuilder(str(folder / f"{PREFIX}.bin"), dtype=DType.optimal_dtype(tokenizer.vocab_size))
    longest = total = 0
    with (folder / IDS).open("w") as ids:
        for batch in corpus.batches(512, "tokenizing"):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, tokens in zip(batch, encoded, strict=True):
                builder.add_document(np.array([*tokens, tokenizer.eos_id]), [len(tokens) + 1])
                ids.write(json.dumps({"id": document.id}) + "\n")
                longest, total = max(longest, len(tokens) + 1), total + len(tokens) + 1
    builder.finalize(str(folder / f"{PREFIX}.idx"))
    return corpus.counts(tokens=total, longest_document=longest)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data tokenize``."""
    run(parse(Options, argv, "m3 data tokenize", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
