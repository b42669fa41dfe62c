"""Reads texts as free software packages install them: dictd dictionaries, HTML pages and manual pages.

Each becomes documents of plain paragraphs. Listings, tables, menus and lines that are no sentence are left out.
"""

import gzip
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from data_tools.records import Document
from megatron_m3.errors import DataError

SHORTEST_PARAGRAPH = 60
"""Characters; shorter ones are headings, menus and remains of tables."""
DIGITS = {digit: place for place, digit in enumerate(
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
MANUAL = re.compile(r".*\.\d\w*\.gz")


def read_articles(path: Path) -> Iterator[Document]:
    """The articles of a dictd dictionary NAME.dict.dz, whose NAME.index lies beside it, as they are set.

    Raises:
        DataError: a file is missing, or the index is not one.
    """
    index = path.with_name(path.name.removesuffix(".dict.dz") + ".index")
    try:
        with gzip.open(path) as stream:
            data = stream.read()
        rows = [line.split("\t") for line in index.read_text(encoding="utf-8").splitlines()]
        places = sorted({(_number(start), _number(size)) for word, start, size in rows if not word.startswith("00-")})
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not a dictd dictionary with its index ({error})") from None
    for start, size in places:
        text = data[start : start + size].decode("utf-8", "replace").strip("\n")
        if not text.startswith("00-"):
            yield Document(f"{start}", text)


def _number(text: str) -> int:
    value = 0
    for digit in text:
        value = value * 64 + DIGITS[digit]
    return value


def article_text(article: str) -> str:
    """An article as paragraphs without marks: lines joined, cross references plain."""
    paragraphs = re.split(r"\n\s*\n", re.sub(r"[{}]", "", article))
    return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


class _Page(HTMLParser):
    """Collects the paragraphs of a page."""

    INLINE = frozenset(("a", "abbr", "acronym", "b", "cite", "code", "em", "i", "kbd", "q", "s", "samp", "small",
                        "span", "strong", "sub", "sup", "tt", "u", "var"))
    SKIPPED = frozenset(("head", "script", "style", "pre", "table", "nav"))

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = [""]
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._skipping += tag in self.SKIPPED
        if tag not in self.INLINE:
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        self._skipping -= tag in self.SKIPPED
        if tag not in self.INLINE:
            self.paragraphs.append("")

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.paragraphs[-1] += data


def read_pages(folder: Path) -> Iterator[Document]:
    """The HTML pages below a folder, in order of name."""
    for path in sorted(folder.rglob("*.html")):
        page = _Page()
        page.feed(path.read_text(encoding="utf-8", errors="replace"))
        yield from _document(path.relative_to(folder).as_posix(), page.paragraphs)


def read_manuals(folder: Path) -> Iterator[Document]:
    """The gzipped manual pages below a folder, in order of name."""
    for path in sorted(one for one in folder.rglob("*.gz") if MANUAL.fullmatch(one.name)):
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as stream:
            yield from _document(path.name.removesuffix(".gz"), manual_paragraphs(stream.read()))


def manual_paragraphs(source: str) -> list[str]:
    """The paragraphs of a page in man's macros."""
    paragraphs, listing = [""], False
    for line in source.splitlines():
        macro, _, rest = line.partition(" ")
        if macro in (".nf", ".EX", ".TS"):
            listing = True
        elif macro in (".fi", ".EE", ".TE"):
            listing = False
        elif listing:
            continue
        elif macro in (".B", ".I", ".SM", ".SB"):
            paragraphs[-1] += " " + " ".join(_arguments(rest))
        elif macro in (".BR", ".RB", ".IR", ".RI", ".BI", ".IB"):
            paragraphs[-1] += " " + "".join(_arguments(rest))
        elif line.startswith((".", "'")):
            paragraphs += [] if line.startswith(('.\\"', "'\\\"")) else [""]
        else:
            paragraphs[-1] += " " + line
    return [_without_escapes(paragraph) for paragraph in paragraphs]


def _arguments(text: str) -> list[str]:
    return [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', text.split(' \\"')[0])]


def _without_escapes(text: str) -> str:
    text = re.sub(r"\\f(?:\[\w*\]|\(\w\w|\w)|\\[&/,|^%]|\\s[-+]?\d", "", text)
    text = re.sub(r"\\\((?:aq|cq|oq)|\\\[(?:aq|cq|oq)\]", "'", text)
    text = re.sub(r"\\\((?:dq|lq|rq)|\\\[(?:dq|lq|rq)\]", '"', text)
    text = re.sub(r"\\\((?:em|en)|\\\[(?:em|en)\]|\\-", "-", text).replace("\\e", "\\\\").replace("\\ ", " ")
    return re.sub(r"\\\[\w+\]|\\\(\w\w|\\\*\(\w\w|\\\*\[\w+\]", "", text)


def _document(name: str, paragraphs: list[str]) -> Iterator[Document]:
    joined = (" ".join(paragraph.split()) for paragraph in paragraphs)
    kept = [paragraph for paragraph in joined if len(paragraph) >= SHORTEST_PARAGRAPH]
    if kept:
        yield Document(name, "\n".join(kept))


TAG = re.compile(r"^.{0,200}?<[a-z ,]+>", re.DOTALL)
"""What stands before a definition of FOLDOC: other names of it, and its field."""
PRONOUNCED = re.compile(r"\\[^\\]*\\|(?:^|(?<=, ))/[^/]*/,?")
BRACKETS = re.compile(r"\[[^\[\]]*\]|<[^<>]*>")
CLASSES = re.compile(
    r"[\s,]*(?:\([^)]*\)[\s,]*)?(?:(?:n|v|a|adj|adv|vt|vi|t|i|pl|prep|interj|conj)\.[\s,&]*)*(?:1\.\s)?")
END = re.compile(r"[;,] as,|--|[\"“]|\bSyn:|\s2\.\s|(?<=[\w)])[.:](?=\s|$)")
HEADWORD = re.compile(r"[A-Za-z][A-Za-z' -]*[A-Za-z]")
UNFIT = re.compile(
    r"(?:see|same as|also)\b|.*(?:\b(?:e\.g|i\.e|cf|viz|for|of|which|that|the)|[,;])$|.*[\[\]{}<>?\\]|/", re.IGNORECASE)


def definition(article: str) -> tuple[str, str] | None:
    """Headword and what its first sense says first, in the form of a WordNet gloss; none if that is unclear."""
    head = article.partition("\n")[0]
    word = head.partition(" \\")[0].strip()
    if not HEADWORD.fullmatch(word) or "[WordNet" in article:
        return None
    text = PRONOUNCED.sub("", TAG.sub("", article[len(word) :].lstrip()))
    while (shorter := BRACKETS.sub(" ", text)) != text:
        text = shorter
    text = " ".join(re.sub(r"[{}]", "", text).split())
    opening = CLASSES.match(text)
    gloss = END.split(text[opening.end() if opening else 0 :].strip(), maxsplit=1)[0].strip(" ;,")
    if not gloss or UNFIT.match(gloss):
        return None
    return word, gloss if gloss[1:2].isupper() else gloss[0].lower() + gloss[1:]
