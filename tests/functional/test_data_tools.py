"""The data tools as a user runs them: good input, bad input, interruption, a full disk."""

import gzip
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_tools import references, tokenize, tokenizer
from data_tools.documents import Corpus
from data_tools.records import SUFFIXES, Document
from megatron_m3.data import TokenStore
from megatron_m3.errors import ArtifactError, ConfigError, DataError
from megatron_m3.references import ReferenceStore
from megatron_m3.tokenizer import Tokenizer
from tests.launcher import ROOT, run_command

TEXTS = ["The word entity means that which is perceived.", "Zweiter Text, mit Ümlaut.\nUnd Zeile.", "x"]


def write_jsonl(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"id": f"d{number}", "text": text}) + "\n"
                            for number, text in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    corpus = write_jsonl(folder / "corpus.jsonl", TEXTS * 4)
    tokenizer.main(["--input", str(corpus), "--output", str(folder / "tokenizer"), "--vocab-size", "300"])
    return folder / "tokenizer"


def run_tokenize(source, trained, output):
    tokenize.main(["--input", str(source), "--tokenizer", str(trained), "--output", str(output)])
    return TokenStore.open(output, check=True)


def run_references(source, trained, output, *more):
    references.main(["--input", str(source), "--tokenizer", str(trained), "--output", str(output), *more])
    return ReferenceStore.open(output, check=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# Reading documents


def test_every_format_gives_the_same_texts(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "c.txt").write_text("\n\n".join(TEXTS) + "\n")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(("\n \n\n".join(TEXTS)).encode()))
    table = pyarrow.table({"id": [f"d{number}" for number in range(3)], "other": [1, 2, 3], "text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "e.parquet")
    (tmp_path / "ignored.csv").write_text("a,b")
    corpus = Corpus([str(tmp_path)])
    documents = list(corpus)
    assert [document.text for document in documents] == TEXTS * 5
    ids = [document.id for document in documents]
    assert ids[:3] == ids[-3:] == ["d0", "d1", "d2"]
    assert ids[6:9] == ["c.txt:1", "c.txt:3", "c.txt:6"]
    assert corpus.bytes_read == sum(path.stat().st_size for path in corpus.files)
    assert not corpus.skipped


def test_bad_records_are_set_aside_with_file_and_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = [b'\xef\xbb\xbf{"text": "good"}', b"{broken", b"", b'{"id": 1}', b'{"text": "caf\xe9"}', b'{"text": "  "}',
             b'["text"]', b'{"text": 5}', b'{"text": "\\ud800"}', b'{"id": "\\ud800", "text": "a"}',
             b'{"id": 7, "text": "fine"}']
    path.write_bytes(b"\n".join(lines))
    corpus = Corpus([str(path)])
    assert list(corpus) == [Document("bad.jsonl:1", "good"), Document("7", "fine")]
    assert [(entry["line"], entry["reason"]) for entry in corpus.skipped] == [
        (2, "not JSON"), (4, "no text"), (5, "not UTF-8"), (6, "empty text"), (7, "no text"), (8, "no text"),
        (9, "not valid Unicode"), (10, "not valid Unicode")]
    assert all(entry["file"] == str(path) for entry in corpus.skipped)
    assert corpus.counts()["documents"] == 2


def test_bad_text_and_parquet_records_are_set_aside(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\ncaf\xe9\n\nfine")
    bad = pyarrow.array([b"good", b"caf\xe9", None, b"fine"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "b.parquet")
    corpus = Corpus([str(tmp_path)])
    assert [document.text for document in corpus] == ["good", "fine"] * 2
    assert [(Path(entry["file"]).name, entry["line"], entry["reason"]) for entry in corpus.skipped] == [
        ("a.txt", 3, "not UTF-8"), ("b.parquet", 2, "not UTF-8"), ("b.parquet", 3, "no text")]


@pytest.mark.parametrize(("name", "data", "message"), [
    ("a.csv", b"a", "unknown type; give one of"),
    ("a.parquet", b"not parquet", "not a readable parquet file"),
    ("a.jsonl.gz", b"not gzip", "damaged gzip file"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-9], "damaged gzip file"),
])
def test_unreadable_files_are_one_line_errors(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        list(Corpus([str(tmp_path / name)]))
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_a_page_of_a_parquet_file_that_its_checksum_denies_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, compression="none", use_dictionary=False,
                                write_statistics=False, write_page_checksum=True)
    assert [document.text for document in Corpus([str(path)])] == TEXTS
    data, word = path.read_bytes(), TEXTS[1].encode()
    assert data.count(word) == 1
    path.write_bytes(data.replace(word, word[:-1] + bytes([word[-1] ^ 1])))
    with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file \(.*CRC"):
        list(Corpus([str(path)]))


def test_parquet_without_a_text_column_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'text' that holds text"):
        list(Corpus([str(tmp_path / "a.parquet")]))


def test_files_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        Corpus([str(tmp_path / "none.jsonl")])
    with pytest.raises(DataError, match="no corpus file there"):
        Corpus([str(tmp_path)])
    assert ".parquet" in SUFFIXES


# Each tool on bad input


@pytest.mark.parametrize("job", ["tokenizer", "tokenize", "references"])
@pytest.mark.parametrize(("data", "message"), [
    (b"", "no usable document; the corpus is empty"),
    (b"\n\n", "no usable document; the corpus is empty"),
    (b'{"a": 1}\n\xff\n', r"no usable document \(1 no text, 1 not UTF-8\)"),
])
def test_a_corpus_without_documents_is_one_line_and_writes_nothing(tmp_path, trained, job, data, message):
    (tmp_path / "in.jsonl").write_bytes(data)
    module = {"tokenizer": tokenizer, "tokenize": tokenize, "references": references}[job]
    options = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")]
    with pytest.raises(DataError, match=message) as error:
        module.main(options + ([] if job == "tokenizer" else ["--tokenizer", str(trained)]))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_skipped_records_are_counted_and_listed(tmp_path, trained, capsys):
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "good"}\n{"a": 1}\n\xff\n')
    run_tokenize(tmp_path / "in.jsonl", trained, tmp_path / "tokens")
    run_references(tmp_path / "in.jsonl", trained, tmp_path / "references")
    shown = capsys.readouterr().err
    assert shown.count("not UTF-8") == shown.count("no text") == 2
    for folder in ("tokens", "references"):
        skipped = [json.loads(line) for line in (tmp_path / folder / "skipped.jsonl").read_text().splitlines()]
        assert [entry["line"] for entry in skipped] == [2, 3]
        assert json.loads((tmp_path / folder / "counts.json").read_text())["skipped"] == 2


def test_a_document_of_one_token(tmp_path, trained):
    source = write_jsonl(tmp_path / "in.jsonl", ["x"])
    tokens = run_tokenize(source, trained, tmp_path / "tokens")
    made = Tokenizer.load(trained)
    assert tokens.document(0).tolist() == [*made.encode("x"), made.eos_id]
    store = run_references(source, trained, tmp_path / "references")
    assert (len(store), store.text(0), store.tokens([0])[1].tolist()) == (1, "x", [1])


def test_tokens_are_a_megatron_dataset_with_ids_and_eos(tmp_path, trained):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    run_tokenize(write_jsonl(tmp_path / "in.jsonl"), trained, tmp_path / "tokens")
    made, indexed = Tokenizer.load(trained), IndexedDataset(str(tmp_path / "tokens" / "tokens"))
    assert [indexed[index].tolist() for index in range(3)] == [[*made.encode(text), made.eos_id] for text in TEXTS]
    assert indexed.document_indices.tolist() == [0, 1, 2, 3]
    assert list(TokenStore.open(tmp_path / "tokens").document_ids()) == ["d0", "d1", "d2"]


def test_long_documents_become_several_references(tmp_path, trained):
    text = "The word entity means that which is perceived. " * 20
    store = run_references(write_jsonl(tmp_path / "in.jsonl", [text, "x"]), trained, tmp_path / "out",
                           "--reference-length", "64", "--block-size", "3")
    texts = store.texts(range(len(store)))
    assert "".join("".join(texts[:-1]).split()) == "".join(text.split())
    assert all(one.endswith(".") for one in texts[:-1])
    assert [store.source(number)[0] for number in (0, len(store) - 2, len(store) - 1)] == ["d0", "d0", "d1"]
    assert store.num_blocks > 1


def test_same_input_same_bytes_and_a_second_run_does_nothing(tmp_path, trained, capsys):
    source = write_jsonl(tmp_path / "in.jsonl")
    for name, run in (("tokens", run_tokenize), ("references", run_references)):
        first = run(source, trained, tmp_path / name)
        before = contents(tmp_path / name)
        run(source, trained, tmp_path / name)
        assert contents(tmp_path / name) == before
        assert "made already" in capsys.readouterr().out
        assert run(source, trained, tmp_path / f"{name} again").hash == first.hash


def test_output_made_from_something_else_is_refused_and_kept(tmp_path, trained):
    source = write_jsonl(tmp_path / "in.jsonl")
    for name, run in (("tokens", run_tokenize), ("references", run_references)):
        run(source, trained, tmp_path / name)
        before = contents(tmp_path / name)
        with pytest.raises(ArtifactError, match="made from other inputs or settings"):
            run(write_jsonl(tmp_path / "other.jsonl", ["y"]), trained, tmp_path / name)
        assert contents(tmp_path / name) == before
        (tmp_path / f"my {name}").mkdir()
        (tmp_path / f"my {name}" / "file").write_text("keep")
        with pytest.raises(ArtifactError, match=r"exists already|not empty"):
            run(source, trained, tmp_path / f"my {name}")
        assert set(contents(tmp_path / f"my {name}")) == {"file"}


def test_a_reference_length_that_cannot_work_is_refused(tmp_path, trained):
    with pytest.raises(ConfigError, match="reference_length=4: must be at least 8"):
        run_references(write_jsonl(tmp_path / "in.jsonl"), trained, tmp_path / "out", "--reference-length", "4")


# Exit status, interruption, full disk


@pytest.mark.parametrize(("arguments", "message"), [
    (["--output", "x", "--input", "y", "--colour", "red"], "unrecognized arguments: --colour red"),
    (["--output", "x"], "the following arguments are required: --input"),
    (["--output", "x", "--input", "none.jsonl"], "none.jsonl: no such file"),
    (["--output", "x", "--input", "none.jsonl", "--vocab-size", "99999999999"], "vocab_size=99999999999: must be at"),
    (["--output", "x", "--input", "none.jsonl", "--vocab-size", "many"], "=many: not a valid int"),
])
def test_user_errors_are_one_line_and_status_2(arguments, message):
    done = run_command([sys.executable, "-m", "data_tools.tokenizer", *arguments], expect=2)
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (ROOT / "x").exists()


@pytest.mark.parametrize("job", ["tokenizer", "tokenize", "references", "wordnet"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, trained, job):
    """The file size limit stands for the full disk: both fail a write in the same way."""
    source = write_jsonl(tmp_path / "in.jsonl", [f"{text} {number}" for number in range(2000) for text in TEXTS])
    options = [] if job == "wordnet" else ["--input", str(source)]
    options += [] if job in ("tokenizer", "wordnet") else ["--tokenizer", str(trained)]
    options += ["--output", str(tmp_path / "out")]
    command = ["bash", "-c", 'ulimit -f 4; exec "$@"', "-", sys.executable, "-m", f"data_tools.{job}", *options]
    done = run_command(command, expect=2)
    assert "Traceback" not in done.stderr
    assert "free space" in done.stderr.splitlines()[-1]
    left = {path.name for path in tmp_path.iterdir()} - {"in.jsonl"}
    assert left <= {"out"}
    assert not list(tmp_path.glob("out/*.safetensors"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_reference_blocks_that_are_there_are_not_written_again(tmp_path, trained):
    source = write_jsonl(tmp_path / "in.jsonl", [f"{text} {number}. " * 9 for number in range(60) for text in TEXTS])
    options = [source, trained, tmp_path / "out", "--block-size", "64", "--reference-length", "16"]
    whole = run_references(*options)
    before = contents(tmp_path / "out")
    assert whole.num_blocks > 4
    for name in ("manifest.json", "block_000002.json", "block_000003.safetensors"):
        (tmp_path / "out" / name).unlink()
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("block_00000[014].*")}
    assert run_references(*options).hash == whole.hash
    assert contents(tmp_path / "out") == before
    assert {path: path.stat().st_mtime_ns for path in left} == left
