"""m3 data plain-text: real text beside the lessons, from free software packages that are unpacked somewhere.

entries.jsonl         words and definitions of dictionaries, for `m3 data lessons --entries`
plain.jsonl           documents of equal length to train on, without references
plain_heldout.jsonl   lines to score, of held-out articles and pages of the same sources
plain_other.jsonl     lines to score, of sources that are not trained on

A source is a dictd dictionary (a file NAME.dict.dz), a folder of HTML pages or a folder of gzipped manual pages; it is
called as the file or folder is, or NAME when given as NAME=PATH. Nothing that mentions a word held out by the lessons
is written to train on.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.documents import show_counts
from data_tools.heldout import Mentions, phrase
from data_tools.published_texts import article_text, definition, read_articles, read_manuals, read_pages
from data_tools.records import Document
from data_tools.texts import write_texts
from data_tools.wordnet import KIND, SCHEMA
from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, DataError, exit_on_user_error
from megatron_m3.manifest import Manifest, hash_file, hash_json, is_finished

if TYPE_CHECKING:
    from megatron_m3.tokenizer import Tokenizer

HELDOUT_SHARE = 20
"""One article or page in this many is held out."""
STRETCH = 64
"""Articles or pages that are joined before they are cut."""
SLACK = 4
"""Tokens by which a piece may grow when it is encoded by itself."""
SHORTEST_GLOSS = 20
"""Characters."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    tokenizer: str
    """Folder of the tokenizer that counts the tokens."""
    output: str
    """Folder to write; it must not exist, or be empty."""
    dictionaries: tuple[str, ...] = ()
    """Dictionaries whose definitions become entries."""
    sources: tuple[str, ...] = ()
    """Sources of plain text to train on."""
    untrained: tuple[str, ...] = ()
    """Sources of plain text that is scored only."""
    avoid: tuple[str, ...] = ()
    """Files of lines to score whose references' words are not to be mentioned, such as heldout_long.jsonl."""
    document_tokens: int = 256
    """Tokens in a document, EOS included; that of the lessons."""
    scored_tokens: int = 64
    """Tokens in a context, and in its target."""
    lines: int = 500
    """Most lines in a file to score."""
    longest_gloss: int = 160
    """Characters in a definition; longer ones are left out."""

    def __post_init__(self) -> None:
        for name, least in (("document_tokens", 128), ("scored_tokens", 1), ("lines", 1), ("longest_gloss", 20)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")
        if not self.dictionaries and not self.sources and not self.untrained:
            raise ConfigError("sources: give at least one of dictionaries, sources and untrained")


type Reader = Callable[[Path], Iterator[Document]]


def open_source(name: str) -> tuple[str, Path, Reader]:
    """Name, path and reader of a source.

    Raises:
        DataError: it is none of the kinds that are known.
    """
    title, equals, given = name.rpartition("=")
    path = Path(given if equals else name)
    title = title or path.name.removesuffix(".dict.dz")
    if path.is_file() and path.name.endswith(".dict.dz"):
        return title, path, read_plain_articles
    if path.is_dir():
        return title, path, read_pages if next(path.rglob("*.html"), None) else read_manuals
    raise DataError(f"{path}: no dictionary NAME.dict.dz and no folder; unpack the package and give its path")


def read_plain_articles(path: Path) -> Iterator[Document]:
    """The articles of a dictionary as paragraphs."""
    return (Document(article.id, article_text(article.text)) for article in read_articles(path))


def read_source(name: str) -> list[Document]:
    """Everything of a source, each document called by it.

    Raises:
        DataError: there is nothing.
    """
    title, path, reader = open_source(name)
    found = [Document(f"{title} {document.id}", document.text) for document in reader(path)]
    if not found:
        raise DataError(f"{path}: no HTML page and no gzipped manual page there")
    return found


def is_heldout(document: Document) -> bool:
    """Whether a document is scored instead of trained on."""
    return _hash(document.id) % HELDOUT_SHARE == 0


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def cut(documents: Iterable[Document], tokens: int, tokenizer: "Tokenizer") -> Iterator[tuple[str, list[int]]]:
    """The documents' text, one after another, in pieces of ``tokens`` tokens, and where each token of one begins."""
    for stretch in batched(documents, STRETCH):
        text = "\n\n".join(document.text for document in stretch)
        starts = [first for first, _ in tokenizer.token_spans(text)]
        for first in range(0, len(starts) - tokens, tokens):
            piece = starts[first : first + tokens + 1]
            yield text[piece[0] : piece[-1]], [start - piece[0] for start in piece]


def make_documents(
    title: str, documents: Iterable[Document], avoided: Mentions, options: Options, tokenizer: "Tokenizer"
) -> list[dict[str, Any]]:
    """Documents to train on, each of just under ``document_tokens`` tokens."""
    most = options.document_tokens - 1
    texts = [text.strip() for text, _ in cut(documents, most - SLACK, tokenizer)]
    lengths = [len(tokens) for tokens in tokenizer.encode_batch(texts)]
    kept = [
        text
        for text, length in zip(texts, lengths, strict=True)
        if most - 4 * SLACK <= length <= most and not avoided.find(text)
    ]
    return [{"id": f"{title} {number}", "text": text} for number, text in enumerate(kept)]


def make_lines(
    title: str, documents: Iterable[Document], options: Options, tokenizer: "Tokenizer"
) -> list[dict[str, Any]]:
    """Lines to score: a stretch of text, and the stretch that follows it."""
    half = options.scored_tokens
    return [
        {"id": f"{title} {number}", "context": text[:middle].lstrip(), "target": text[middle:], "references": []}
        for number, (text, starts) in enumerate(cut(documents, 2 * half, tokenizer))
        for middle in [starts[half]]
    ]


def share_out(lines: Sequence[Sequence[dict[str, Any]]], most: int) -> list[dict[str, Any]]:
    """At most ``most`` lines, equally many of each source as far as they go, chosen by hash."""
    each = most // max(1, len(lines))
    return [line for one in lines for line in sorted(one, key=lambda line: _hash(line["id"]))[:each]]


def make_entries(name: str, avoided: Mentions, longest: int) -> Iterator[dict[str, Any]]:
    """Words and definitions of a dictionary, but for the articles that are held out."""
    title, path, reader = open_source(name)
    if reader is not read_plain_articles:
        raise DataError(f"{path}: is a folder; definitions come from a dictionary NAME.dict.dz")
    for number, text in read_articles(path):
        article, found = Document(f"{title} {number}", text), definition(text)
        if not found or is_heldout(article) or avoided.find(": ".join(found)):
            continue
        if SHORTEST_GLOSS <= len(found[1]) <= longest:
            yield {"id": article.id, "word": found[0], "gloss": found[1]}


def read_avoided(files: Sequence[str]) -> Mentions:
    """The words that the references of lines to score define.

    Raises:
        DataError: a file is not of such lines.
    """
    words = set()
    for name in files:
        try:
            for line in Path(name).read_bytes().splitlines():
                texts = json.loads(line)["references"]
                words |= {phrase(entry.partition(": ")[0]) for text in texts for entry in text.split("\n")}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{name}: not lines to score ({error}); give a file that `m3 data lessons` made") from None
    return Mentions(words)


def make_texts(options: Options, tokenizer: "Tokenizer") -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """The lines of each file, and counts."""
    avoided = read_avoided(options.avoid)
    plain: list[dict[str, Any]] = []
    heldout, other, counts = [], [], {}
    for name in options.sources:
        title, documents = open_source(name)[0], read_source(name)
        made = make_documents(title, [one for one in documents if not is_heldout(one)], avoided, options, tokenizer)
        plain += made
        counts[f"{title} documents"] = len(made)
        heldout.append(make_lines(title, filter(is_heldout, documents), options, tokenizer))
    for name in options.untrained:
        other.append(make_lines(open_source(name)[0], filter(is_heldout, read_source(name)), options, tokenizer))
    entries = [entry for name in options.dictionaries for entry in make_entries(name, avoided, options.longest_gloss)]
    texts = {"entries": entries, "plain": plain, "plain_heldout": share_out(heldout, options.lines),
             "plain_other": share_out(other, options.lines)}
    return texts, counts | {f"{name} lines": len(lines) for name, lines in texts.items()}


def hash_source(name: str) -> str:
    """One hash for the files of a source."""
    path = open_source(name)[1]
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    return hash_json([hash_file(one)["sha256"] for one in files])


def run(options: Options) -> None:
    """Write the texts; nothing is done when they are there already, made from the same sources."""
    from megatron_m3.tokenizer import Tokenizer

    output, tokenizer = Path(options.output), Tokenizer.load(options.tokenizer)
    names = (*options.dictionaries, *options.sources, *options.untrained)
    inputs = {"tokenizer": tokenizer.hash} | {open_source(name)[0]: hash_source(name) for name in names}
    given = json.loads(json.dumps(asdict(options)))
    settings = {name: given[name] for name in ("document_tokens", "scored_tokens", "lines", "longest_gloss")} | {
        role: [open_source(name)[0] for name in given[role]] for role in ("dictionaries", "sources", "untrained")}
    settings["avoid"] = sorted(" ".join(one) for one in read_avoided(options.avoid).phrases)
    if is_finished(output, KIND, SCHEMA, inputs, settings):
        print(f"{output}: made already")
        return
    texts, counts = make_texts(options, tokenizer)
    manifest = Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings=settings, files={}, info=counts)
    write_texts(output, texts, manifest)
    show_counts("plain text", counts)
    print(output)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data plain-text``."""
    run(parse(Options, argv, "m3 data plain-text", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
