"""Text of installed packages: dictionaries, pages and manuals as documents, definitions and lines to score."""

import gzip
import json
from pathlib import Path

import pytest

from data_tools import plain_text
from data_tools.plain_text import is_heldout
from data_tools.published_texts import DIGITS, definition, manual_paragraphs, read_articles, read_pages
from data_tools.records import Document
from megatron_m3.errors import ConfigError, DataError
from megatron_m3.tokenizer import Tokenizer, train_tokenizer

ARTICLES = [
    'Abjuratory \\Ab*ju"ra*to*ry\\, a.\n   Containing or holding abjuration.\n   [1913 Webster]\n',
    'Ablation \\Ab*la"tion\\, n. [L. ablatio, fr. [x] latus,\n   p. p. of ferre carry. See {Tolerate}.]\n'
    "   1. A carrying or taking away; {removal}. --Jer. Taylor.\n      [1913 Webster]\n\n   2. (Med.) Extirpation.\n",
    'Holm \\Holm\\, n. [See {Holly}.] (Bot.)\n   A common evergreen oak, of Europe ({Quercus Ilex}); as, a holm.\n',
    "actor\n\n   1. <programming> In {object-oriented} programming, an {object} which\n   exists as a process.\n",
    "crlf\n /kru/, /C.R.L.F/, n.\n\n    A carriage return, followed by a line feed.\n",
    "dull\n\n   The same as before, for\n",
    'Zebu \\Ze"bu\\, n.\n   See {Bos}.\n',
    'Abacus \\Ab"a*cus\\, n.\n   A tablet with balls sliding on wires [WordNet 1.5]\n',
]


def write_dictionary(folder: Path, articles: list[str]) -> Path:
    digits, start, rows = "".join(DIGITS), 0, []
    for number, article in enumerate(["00-database-info\n about\n", *articles]):
        name = "00-database-info" if not number else article.split()[0]
        places = [next(d for d in digits if DIGITS[d] == value >> 6) + digits[value & 63]
                  if value >> 6 < 64 else digits[value >> 12] + digits[value >> 6 & 63] + digits[value & 63]
                  for value in (start, len(article.encode()))]
        rows += ["\t".join([name, *places])] * 2
        start += len(article.encode())
    (folder / "words.index").write_text("\n".join(rows) + "\n")
    (folder / "words.dict.dz").write_bytes(gzip.compress(("00-database-info\n about\n" + "".join(articles)).encode()))
    return folder / "words.dict.dz"


def test_dictionary_articles_and_their_definitions(tmp_path: Path) -> None:
    found = list(read_articles(write_dictionary(tmp_path, ARTICLES)))
    assert [article.text for article in found] == [article.strip("\n") for article in ARTICLES]
    assert [definition(article.text) for article in found] == [
        ("Abjuratory", "containing or holding abjuration"),
        ("Ablation", "a carrying or taking away; removal"),
        ("Holm", "(Bot.) A common evergreen oak, of Europe (Quercus Ilex)"),
        ("actor", "in object-oriented programming, an object which exists as a process"),
        ("crlf", "a carriage return, followed by a line feed"),
        None, None, None,
    ]


def test_pages_and_manuals_keep_sentences_only(tmp_path: Path) -> None:
    sentence = "A paragraph that is long enough to be a sentence of its own, and no heading."
    (tmp_path / "one.html").write_text(
        f"<head><title>{sentence}</title></head><h1>Title</h1><p>{sentence[:30]}<em>{sentence[30:]}</em></p>"
        f"<pre>{sentence}</pre><ul><li>short</li><li>{sentence}</li></ul>")
    assert [document.text for document in read_pages(tmp_path)] == [f"{sentence}\n{sentence}"]
    source = '.\\" note\nThe\n.BR poll (2)\ncall \\- see\n.I "an event"\n.PP\nNext.\n.EX\nint x;\n.EE\nIt\\(aqs.\n'
    paragraphs = [" ".join(paragraph.split()) for paragraph in manual_paragraphs(source)]
    assert [paragraph for paragraph in paragraphs if paragraph] == [
        "The poll(2) call - see an event", "Next. It's."]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A handbook of 60 pages, a dictionary, lines to score that hold out a word of page 7, and a tokenizer."""
    root = tmp_path_factory.mktemp("package")
    (root / "book").mkdir()
    pages = []
    for number in range(60):
        said = [f"On page {number} the rule {line} of {number * line} says what the reader wants to know of it."
                for line in range(40)]
        said += ["Nobody but this page tells of the gloomy ocelot in a whole sentence."] * (number == 7)
        pages.append(said)
        (root / "book" / f"page{number:02}.html").write_text("".join(f"<p>{line}</p>" for line in said))
    train_tokenizer([" ".join(page) for page in pages], 600, root / "tokenizer")
    line = {"id": "1", "context": "The word ocelot means", "target": " a cat", "references": ["ocelot: a cat\nape: x"]}
    (root / "heldout_long.jsonl").write_text(json.dumps(line) + "\n")
    write_dictionary(root, [f"word{first}{second}\n   A thing called {first}, and then {second}.\n"
                            for first in "abcdefghijklm" for second in "abcdefghijklm"])
    return root


def test_documents_fill_their_chunks_and_held_out_pages_are_only_scored(package: Path) -> None:
    out = package / "plain"
    plain_text.main(["--tokenizer", str(package / "tokenizer"), "--output", str(out), "--sources",
                     f"book={package / 'book'}", "--untrained", f"again={package / 'book'}", "--dictionaries",
                     str(package / "words.dict.dz"), "--avoid", str(package / "heldout_long.jsonl"), "--lines", "20"])
    read = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in out.glob("*.jsonl")}
    tokenizer = Tokenizer.load(package / "tokenizer")
    articles = [Document(f"words {one.id}", one.text) for one in read_articles(package / "words.dict.dz")]
    taught = [one.text.split()[0] for one in articles if not is_heldout(one)]
    assert [entry["word"] for entry in read["entries"]] == taught
    assert 140 < len(taught) < len(articles) == 169
    lengths = [len(tokenizer.encode(one["text"])) + 1 for one in read["plain"]]
    assert min(lengths) > 192
    assert max(lengths) <= 256
    trained = "\n".join(one["text"] for one in read["plain"])
    assert "page 6" in trained
    assert "ocelot" not in trained
    for name in ("plain_heldout", "plain_other"):
        assert 5 <= len(read[name]) <= 20
        for line in read[name]:
            assert line["references"] == []
            assert 60 <= len(tokenizer.encode(line["context"])) <= 66
            assert 60 <= len(tokenizer.encode(line["target"])) <= 66
            assert line["target"] not in trained or name == "plain_other"


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--sources", "nowhere"], DataError, "nowhere: no dictionary"),
        (["--dictionaries", "book"], DataError, "book: is a folder"),
        (["--sources", "book", "--avoid", "words.index"], DataError, "words.index: not lines to score"),
        ([], ConfigError, "sources: give at least one"),
    ],
)
def test_wrong_sources_are_named(
    package: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(package)
    with pytest.raises(error, match=message):
        plain_text.main(["--tokenizer", "tokenizer", "--output", "wrong", *words])
    assert not Path("wrong").exists()
