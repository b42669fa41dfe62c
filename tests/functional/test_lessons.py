"""Lessons: what is held out, how documents fill their chunks, and the references that documents name."""

import gzip
import json
import re
from pathlib import Path

import pytest

from data_tools import assign, lessons, references, tokenize
from data_tools.heldout import choose_heldout, clear_entries
from data_tools.packing import count_tokens
from data_tools.wordnet import CORPUS, Entry, load_entries
from megatron_m3.data import TokenStore
from megatron_m3.data.neighbours import NeighbourStore
from megatron_m3.errors import ArtifactError, ConfigError, DataError, M3Error
from megatron_m3.references import ReferenceStore
from megatron_m3.tokenizer import Tokenizer, train_tokenizer

CHUNK, CHUNKS = 64, 4
MORE = [{"id": f"more {number}", "word": f"quidnunc{number}", "gloss": f"a person of kind {number} who asks for news"}
        for number in range(30)]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lessons of every 100th entry of WordNet and of MORE, tokenized, and their references."""
    root = tmp_path_factory.mktemp("lessons")
    rows = gzip.decompress((CORPUS / "entries.jsonl.gz").read_bytes()).splitlines(keepends=True)[::100]
    (root / "corpus").mkdir()
    (root / "corpus" / "entries.jsonl.gz").write_bytes(gzip.compress(b"".join(rows)))
    tokenizer = train_tokenizer([json.loads(row)["gloss"] for row in rows], 1500, root / "tokenizer")
    entries = load_entries(root / "corpus", 160)
    heldout = choose_heldout(entries, count_tokens(entries, tokenizer), 18, 1234, 100, 128)
    word = heldout[0][0].word
    (root / "more.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*MORE, {
        "id": "mentions", "word": "zzyzx", "gloss": f"what {word} is said to be by those who know"}]))
    options = lessons.Options(tokenizer=str(tokenizer.folder), output=str(root / "texts"), heldout=12, calibration=6,
                              entries=(str(root / "more.jsonl"),))
    lessons.run(options, root / "corpus")
    common = ["--tokenizer", str(root / "tokenizer")]
    tokenize.main(["--input", str(root / "texts" / "train.jsonl"), "--output", str(root / "tokens"), *common])
    known = str(root / "texts" / "references.jsonl")
    references.main(["--input", known, "--output", str(root / "references"), *common])
    return root


def plain_words(text: str) -> str:
    return f" {' '.join(re.findall(r'\w+', text.casefold()))} "


def test_held_out_words_stand_nowhere_in_training(made: Path) -> None:
    texts = [line["text"] for name in ("train", "references") for line in read(made / "texts" / f"{name}.jsonl")]
    trained = "\n".join(plain_words(line) for text in texts for line in text.splitlines())
    heldout = [line for name in ("heldout", "calibration") for line in read(made / "texts" / f"{name}_long.jsonl")]
    entries = [entry for line in heldout for entry in line["references"][0].splitlines()]
    assert len(heldout) == 18
    assert len(set(entries)) == len(entries) >= 5 * 18
    for entry in entries:
        word, gloss = entry.split(": ", 1)
        assert plain_words(word) not in trained
        assert plain_words(gloss) not in trained
    assert "quidnunc3 " in trained
    assert "zzyzx" not in trained, "an entry that mentions a held-out word is not taught"


def test_only_entries_that_nothing_else_gives_away_can_be_held_out() -> None:
    said = {"axolotl": "a salamander that keeps its gills", "Axolotl pen": "where it is kept by its owner",
            "ewer": "a jug that has a wide mouth", "jug": "A jug, that has a wide mouth.", "adze": "a tool",
            "word play": "a humorous play on how words sound", "play": "what children do the whole day",
            "quoin": "the keystone of an arch in a wall", "quoins": "more than one of these in a wall"}
    entries = [Entry(word, word, gloss, "") for word, gloss in said.items()]
    assert {entry.word for entry in clear_entries(entries)} == {"Axolotl pen", "quoin", "quoins"}


def test_the_three_forms_ask_the_same(made: Path) -> None:
    tokenizer = Tokenizer.load(made / "tokenizer")
    places = set()
    short, long, five = (read(made / "texts" / f"heldout_{name}.jsonl") for name in ("short", "long", "five"))
    for one, several, among in zip(short, long, five, strict=True):
        assert one["id"] == several["id"] == among["id"]
        entry = one["context"].removeprefix("The word ").removesuffix(" means") + ":" + one["target"]
        assert one["references"] == [entry]
        (reference,) = several["references"]
        assert entry in reference.splitlines()
        assert 5 <= len(reference.splitlines()) <= 7
        assert 100 <= len(tokenizer.encode(reference)) <= 128
        assert len(set(among["references"])) == 5
        assert sum(entry in text for text in among["references"]) == 1
        places.add(among["references"].index(reference))
    assert places == {0, 1, 2, 3, 4}


def test_every_line_is_asked_where_its_reference_can_be_read(made: Path) -> None:
    tokenizer = Tokenizer.load(made / "tokenizer")
    known = {line["id"]: line["text"].splitlines() for line in read(made / "texts" / "references.jsonl")}
    documents = read(made / "texts" / "train.jsonl")
    asked, used = set(), 0
    for document in documents:
        lines = document["text"].splitlines()
        lengths = [len(tokenizer.encode(f"{line}\n")) for line in lines]
        assert len(tokenizer.encode(document["text"])) + 1 == sum(lengths)
        assert (CHUNKS - 1) * CHUNK < sum(lengths) <= CHUNKS * CHUNK
        used += sum(lengths)
        for place, line in enumerate(lines):
            chunk = sum(lengths[:place]) // CHUNK
            stated = line.removeprefix("The word ").removesuffix(".").replace(" means ", ": ", 1)
            assert any(stated in known[one] for one in document["references"][: chunk + 1])
            asked.add(stated)
    assert used > 0.98 * CHUNKS * CHUNK * len(documents)
    assert asked >= {line for lines in known.values() for line in lines}
    assert sum(len(lines) == 1 for lines in known.values()) > 0.2 * len(known)


def test_lessons_as_text_say_their_references_and_then_ask_the_same(made: Path) -> None:
    texts = {row["id"]: row["text"] for row in read(made / "texts" / "references.jsonl")}
    lines, told = read(made / "texts" / "train.jsonl"), read(made / "texts" / "train_text.jsonl")
    assert [row["id"] for row in told] == [row["id"] for row in lines]
    for with_text, document in zip(told, lines, strict=True):
        assert set(with_text) == {"id", "text"}
        assert with_text["text"].endswith("\n" + document["text"])
        said = with_text["text"].removesuffix("\n" + document["text"])
        assert said == "\n".join(texts[one] for one in document["references"] if one)


def test_the_seed_decides_everything(made: Path, tmp_path: Path) -> None:
    def make(name: str, **more: int) -> dict[str, bytes]:
        options = lessons.Options(tokenizer=str(made / "tokenizer"), output=str(tmp_path / name), heldout=12,
                                  calibration=6, entries=(str(made / "more.jsonl"),), **more)
        lessons.run(options, made / "corpus")
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    first = {path.name: path.read_bytes() for path in (made / "texts").iterdir()}
    assert make("again") == first
    other = make("other", seed=7)
    assert all(other[name] != first[name] for name in ("train.jsonl", "heldout_short.jsonl"))


def test_chunks_get_the_references_that_their_document_names(made: Path, tmp_path: Path) -> None:
    assign.main(["--input", str(made / "texts" / "train.jsonl"), "--tokens", str(made / "tokens"), "--references",
                 str(made / "references"), "--output", str(tmp_path / "given"), "--documents-per-block", "50"])
    tokens, known = TokenStore.open(made / "tokens"), ReferenceStore.open(made / "references")
    store = NeighbourStore.open(tmp_path / "given", check=True, tokens=tokens.hash, references=known.hash,
                                tokenizer=tokens.tokenizer_hash)
    texts = {line["id"]: line["text"] for line in read(made / "texts" / "references.jsonl")}
    for number, document in enumerate(read(made / "texts" / "train.jsonl")):
        rows = store.rows(number)
        assert rows.ids.shape == (CHUNKS, 1)
        named = document["references"]
        assert rows.valid[:, 0].tolist() == [one is not None for one in named]
        assert [known.text(int(id)) for id in rows.ids[rows.valid]] == [texts[one] for one in named if one]


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        (["nobody"], DataError, "names the reference nobody, which .* lacks"),
        ([None, None, None], DataError, "3 references for 1 chunks"),
        ("single", DataError, r"line 1: references is not a list"),
        ([None], None, ""),
    ],
)
def test_what_documents_name_is_checked(
    made: Path, tmp_path: Path, named: object, error: type[M3Error] | None, message: str
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"id": 1, "text": "A short text.", "references": named}) + "\n")
    tokenize.main(["--input", str(text), "--tokenizer", str(made / "tokenizer"), "--output", str(tmp_path / "tokens")])
    words = ["--input", str(text), "--tokens", str(tmp_path / "tokens"), "--references", str(made / "references"),
             "--output", str(tmp_path / "given")]
    if error:
        with pytest.raises(error, match=message):
            assign.main(words)
        assert not (tmp_path / "given" / "manifest.json").exists()
    else:
        assign.main(words)
        assert not NeighbourStore.open(tmp_path / "given").rows(0).valid.any()
        text.write_text(text.read_text().replace("short", "changed"))
        with pytest.raises(ArtifactError, match="made from another corpus"):
            assign.main(words)


def test_more_entries_are_lines_of_texts(tmp_path: Path) -> None:
    path, row = tmp_path / "entries.jsonl", {"id": "1", "word": "x", "gloss": "one\u2028line"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n")
    assert [entry.gloss for entry in lessons.read_entries([str(path)], 20)] == [row["gloss"]]
    for field in row:
        path.write_text(json.dumps(row | {field: 7}))
        with pytest.raises(DataError, match="not lines with id, word and gloss"):
            lessons.read_entries([str(path)], 20)


@pytest.mark.parametrize(
    ("field", "value"), [("documents", ("SL",)), ("documents", ("LS", "L")), ("orders", ("size",)), ("heldout", 4)]
)
def test_bad_options_are_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}="):
        lessons.Options(tokenizer="t", output="o", **{field: value})
