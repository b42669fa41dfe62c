"""m3 data tokenizer: train a byte-level BPE tokenizer on a corpus, or extend one by a second language.

With --extend, all tokens and merges of the base keep their places; text without the second language's characters is
encoded to the same ids as by the base. Tokens per character before and after are printed for the input.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.documents import Corpus, show_counts
from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, exit_on_user_error
from megatron_m3.manifest import is_finished

if TYPE_CHECKING:
    from megatron_m3.tokenizer import Tokenizer

MEASURED_CHARACTERS = 1_000_000
"""Characters of the input, at its beginning, whose tokens are counted before and after an extension."""
MAX_VOCAB_SIZE = 10_000_000
"""Largest --vocab-size: the trainer allocates its table at the start."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    input: tuple[str, ...]
    """Documents that other steps wrote, or files and folders as `m3 data collect` reads, separated by commas."""
    output: str
    """Folder to write; it must not exist, or be empty."""
    vocab_size: int = 8192
    """Tokens in the vocabulary, special tokens and those of a base included; a small corpus may give fewer."""
    extend: str = ""
    """Folder of a tokenizer to extend; the input is then of the second language."""
    characters: str = r"\p{Han}\u3000-\u303f\uff00-\uffef"
    """With --extend, the characters to learn, as what stands between [ and ] in a regular expression; Chinese."""

    def __post_init__(self) -> None:
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ConfigError(f"vocab_size={self.vocab_size}: must be at most {MAX_VOCAB_SIZE:,}")


def run(options: Options) -> None:
    """Make the tokenizer; nothing is done when the output is there already, made from the same corpus."""
    from megatron_m3.tokenizer import Tokenizer, extend_tokenizer, train_tokenizer
    from megatron_m3.tokenizer.extend import settings_of_extension
    from megatron_m3.tokenizer.tokenizer import KIND, SCHEMA, settings

    corpus, output = Corpus(options.input), Path(options.output)
    inputs = {"corpus": corpus.hash}
    base = Tokenizer.load(options.extend) if options.extend else None
    if base:
        wanted = settings_of_extension(base, options.vocab_size, options.characters)
        made = is_finished(output, KIND, SCHEMA, inputs | {"base": base.hash}, wanted)
    else:
        made = is_finished(output, KIND, SCHEMA, inputs, settings(options.vocab_size))
    if made:
        print(f"{output}: made already")
        return
    corpus.check()

    sample: list[str] = []

    def texts() -> Iterator[str]:
        characters = 0
        for batch in corpus.batches("reading the corpus"):
            for document in batch:
                yield document.text
                if characters < MEASURED_CHARACTERS:
                    sample.append(document.text)
                    characters += len(document.text)

    if base:
        tokenizer = extend_tokenizer(base, texts(), options.vocab_size, output, characters=options.characters,
                                     inputs=inputs)
        print(f"tokens per character: {tokens_per_character(base, sample):.4f} before, "
              f"{tokens_per_character(tokenizer, sample):.4f} after")
    else:
        tokenizer = train_tokenizer(texts(), options.vocab_size, output, inputs=inputs)
    counts = corpus.counts(tokens_in_vocabulary=tokenizer.vocab_size)
    corpus.write_account(output, counts)
    show_counts("tokenizer", counts)
    print(output)


def tokens_per_character(tokenizer: "Tokenizer", texts: Sequence[str]) -> float:
    """How many tokens a character of the texts takes, on average."""
    return sum(len(tokenizer.encode(text)) for text in texts) / sum(map(len, texts))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data tokenizer``."""
    run(parse(Options, argv, "m3 data tokenizer", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
