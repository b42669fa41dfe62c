"""m3 data tokenizer: train a byte-level BPE tokenizer on a corpus."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.documents import Corpus, show_counts
from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, exit_on_user_error
from megatron_m3.manifest import is_finished

MAX_VOCAB_SIZE = 10_000_000
"""Largest --vocab-size: the trainer allocates its table at the start."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    input: tuple[str, ...]
    """Corpus files or folders (JSONL, txt, parquet; JSONL and txt also .gz), separated by commas."""
    output: str
    """Folder to write; it must not exist, or be empty."""
    vocab_size: int = 8192
    """Tokens in the vocabulary, special tokens included; a small corpus may give fewer."""

    def __post_init__(self) -> None:
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ConfigError(f"vocab_size={self.vocab_size}: must be at most {MAX_VOCAB_SIZE:,}")


def run(options: Options) -> None:
    """Train the tokenizer; nothing is done when the output is there already, made from the same corpus."""
    from megatron_m3.tokenizer import train_tokenizer
    from megatron_m3.tokenizer.tokenizer import KIND, SCHEMA, settings

    corpus, output = Corpus(options.input), Path(options.output)
    inputs = {"corpus": corpus.hash}
    if is_finished(output, KIND, SCHEMA, inputs, settings(options.vocab_size)):
        print(f"{output}: made already")
        return
    corpus.check()

    def texts() -> Iterator[str]:
        for batch in corpus.batches(1000, "reading the corpus"):
            yield from (document.text for document in batch)

    tokenizer = train_tokenizer(texts(), options.vocab_size, output, inputs=inputs)
    counts = corpus.counts(tokens_in_vocabulary=tokenizer.vocab_size)
    corpus.write_account(output, counts)
    show_counts("tokenizer", counts)
    print(output)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data tokenizer``."""
    run(parse(Options, argv, "m3 data tokenizer", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
