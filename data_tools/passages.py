"""m3 data passages: lines to score from any text, in which a memory is asked to go on with what it holds.

passages.jsonl       {"id", "context", "target", "references": [passage]}: words out of a passage, and the next ones
calibration.jsonl    the same for other passages, to train codecs on

A passage is what `m3 data references` would make a reference, if it is long enough. Passages are taken by the hash of
their document and place, so the same corpus gives the same lines.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.documents import Corpus, show_counts
from data_tools.references import Reference, find_references
from data_tools.texts import write_texts
from data_tools.wordnet import KIND, SCHEMA
from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, DataError, exit_on_user_error
from megatron_m3.manifest import Manifest, is_finished

if TYPE_CHECKING:
    from megatron_m3.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    input: tuple[str, ...]
    """Documents that other steps wrote, or files and folders as `m3 data collect` reads, separated by commas."""
    tokenizer: str
    """Folder of the tokenizer that counts the tokens."""
    output: str
    """Folder to write; it must not exist, or be empty."""
    lines: int = 200
    """Lines in each of the two files."""
    reference_length: int = 128
    """Most tokens in a passage."""
    context_tokens: int = 16
    """Tokens that are given."""
    target_tokens: int = 32
    """Tokens that are asked."""

    def __post_init__(self) -> None:
        for name in ("lines", "context_tokens", "target_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.reference_length < self.shortest:
            raise ConfigError(f"reference_length={self.reference_length}: a passage must hold {self.shortest} tokens; "
                              "give more, or fewer context_tokens and target_tokens")

    @property
    def shortest(self) -> int:
        """Fewest tokens in a passage."""
        return max(self.context_tokens + self.target_tokens, 3 * self.reference_length // 4)


def run(options: Options) -> None:
    """Write both files."""
    from megatron_m3.tokenizer import Tokenizer

    corpus, output, tokenizer = Corpus(options.input), Path(options.output), Tokenizer.load(options.tokenizer)
    inputs = {"corpus": corpus.hash, "tokenizer": tokenizer.hash}
    settings = {name: value for name, value in asdict(options).items() if name not in ("input", "tokenizer", "output")}
    if is_finished(output, KIND, SCHEMA, inputs, settings):
        print(f"{output}: made already")
        return
    references = find_references(corpus.batches("cutting passages"), tokenizer, options.reference_length)
    found = [one for one in references if len(one.tokens) >= options.shortest]
    found.sort(key=draw)
    if len(found) < 2 * options.lines:
        raise DataError(f"input: {len(found):,} passages of {options.shortest} to {options.reference_length} tokens; "
                        f"{2 * options.lines:,} are needed: give more text or fewer --lines")
    drawn = found[: options.lines], found[options.lines : 2 * options.lines]
    texts = {name: [ask(one, tokenizer, options) for one in some]
             for name, some in zip(("passages", "calibration"), drawn, strict=True)}
    counts = corpus.counts(passages=len(found), lines=2 * options.lines)
    write_texts(output, texts, Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings=settings, files={},
                                        info=counts | {"corpus": corpus.file_hashes}))
    show_counts("lines", counts)
    print(output)


def draw(passage: Reference) -> bytes:
    """A number that follows from where a passage stands."""
    return hashlib.sha256(f"{passage.document_id}:{passage.first_token}".encode()).digest()


def ask(passage: Reference, tokenizer: "Tokenizer", options: Options) -> dict[str, object]:
    """The line of a passage."""
    text, spans = passage.text, tokenizer.token_spans(passage.text)
    last = len(spans) - options.context_tokens - options.target_tokens
    first = int.from_bytes(draw(passage)[:4], "little") % (last + 1)
    middle, end = first + options.context_tokens, first + options.context_tokens + options.target_tokens
    cuts = [spans[first][0], spans[middle][0], spans[end][0] if end < len(spans) else len(text)]
    return {"id": f"{passage.document_id}:{passage.first_token}", "context": text[cuts[0] : cuts[1]],
            "target": text[cuts[1] : cuts[2]], "references": [text]}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and run."""
    run(parse(Options, argv, "m3 data passages", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
