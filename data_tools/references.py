"""m3 data references: cut documents into references of at most 128 tokens, the knowledge base.

References end at sentence ends where possible; a document that fits is one reference; nothing is cut off silently.
A killed job goes on from its last whole block.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data_tools.documents import Corpus, show_counts
from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, exit_on_user_error
from megatron_m3.manifest import BlockFolder, Manifest, is_finished, write_manifest

if TYPE_CHECKING:
    from megatron_m3.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    input: tuple[str, ...]
    """Files or folders of the documents (JSONL, txt, parquet; JSONL and txt also .gz), separated by commas."""
    tokenizer: str
    """Folder of the tokenizer, made by `m3 data tokenizer`."""
    output: str
    """Folder to write."""
    reference_length: int = 128
    """Most tokens in a reference."""
    block_size: int = 16384
    """References in a block file."""

    def __post_init__(self) -> None:
        if self.reference_length < 8:
            raise ConfigError(f"reference_length={self.reference_length}: must be at least 8")
        if self.block_size < 1:
            raise ConfigError(f"block_size={self.block_size}: must be at least 1")


def run(options: Options) -> None:
    """Write the reference blocks that are missing, then the manifest."""
    from megatron_m3.references.store import KIND, SCHEMA
    from megatron_m3.tokenizer import Tokenizer

    corpus, output, tokenizer = Corpus(options.input), Path(options.output), Tokenizer.load(options.tokenizer)
    inputs = {"corpus": corpus.hash, "tokenizer": tokenizer.hash}
    settings = {"reference_length": options.reference_length, "block_size": options.block_size}
    if is_finished(output, KIND, SCHEMA, inputs, settings):
        print(f"{output}: made already")
        return
    corpus.check()
    job = {"kind": KIND, "schema": SCHEMA, "inputs": inputs, "settings": settings}
    folder = BlockFolder(output, job)
    num_blocks = write_blocks(folder, corpus, tokenizer, options)
    references = sum(info["references"] for info in folder.info(num_blocks))
    counts = corpus.counts(references=references, blocks=num_blocks)
    corpus.write_account(output, counts)
    files = folder.files(num_blocks)
    info = counts | {"corpus": corpus.file_hashes}
    write_manifest(output, Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings=settings, files=files, info=info))
    show_counts("references", counts)
    print(output)


class Reference(NamedTuple):
    """One reference, with its place in the corpus."""

    text: str
    tokens: list[int]
    document_id: str
    first_token: int
    place: tuple[int, int]
    """Number of its document in the corpus, and its number in the document."""


def write_blocks(folder: BlockFolder, corpus: Corpus, tokenizer: "Tokenizer", options: Options) -> int:
    """Write the blocks after the last whole one; return the number of blocks."""
    from megatron_m3.references import arrays_of_block

    index, start = 0, (0, 0)
    while folder.done(index):
        start = tuple(folder.read_info(index)["next"])
        index += 1
    references = find_references(corpus, tokenizer, options.reference_length, start)
    while block := list(itertools.islice(references, options.block_size)):
        arrays = arrays_of_block([one[:4] for one in block], options.reference_length, tokenizer.vocab_size)
        document, number = block[-1].place
        folder.write(index, arrays, {"references": len(block), "next": (document, number + 1)})
        index += 1
    return index


def find_references(
    corpus: Corpus, tokenizer: "Tokenizer", limit: int, start: tuple[int, int] = (0, 0)
) -> Iterator[Reference]:
    """All references of the corpus from place ``start`` on."""
    from megatron_m3.references import Piece, split_text

    number = -1
    for batch in corpus.batches(512, "cutting references"):
        todo = [(number + 1 + offset, document) for offset, document in enumerate(batch)]
        number += len(batch)
        todo = [one for one in todo if one[0] >= start[0]]
        tokens = tokenizer.encode_batch([document.text for _, document in todo])
        for (place, document), ids in zip(todo, tokens, strict=True):
            fits = len(ids) <= limit
            pieces = [Piece(document.text, ids, 0)] if fits else split_text(tokenizer, document.text, limit)
            for part, piece in enumerate(pieces):
                if piece.tokens and (place, part) >= start:
                    yield Reference(*piece[:2], document.id, piece.first_token, (place, part))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data references``."""
    run(parse(Options, argv, "m3 data references", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
