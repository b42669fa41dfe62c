"""From raw files to kept documents: what each format gives, what is set aside and why, and the same bytes always."""

import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from data_tools import collect, deduplicate, documents, references
from data_tools import filter as filtering
from data_tools.document_store import DocumentStore
from data_tools.pieces import make_plan
from data_tools.wordnet import CORPUS, load_entries
from megatron_m3.errors import ArtifactError, ConfigError, DataError
from megatron_m3.manifest import BlockFolder, Manifest, hash_file, write_manifest
from megatron_m3.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]


def rows_of(folder):
    store = DocumentStore.open(folder)
    return [row for index in range(len(store.sizes)) for batch in store.batches(index) for row in batch.to_pylist()]


def dropped_of(folder):
    files = sorted((folder / "dropped").iterdir())
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(data):
    return pyarrow.compress(data, "zstd", asbytes=True)


def warc_of(pages):
    """A WARC file of responses: url, status, type, body."""
    records = []
    for url, status, kind, body in pages:
        http = f"HTTP/1.1 {status} OK\r\nContent-Type: {kind}\r\n\r\n".encode() + body
        records.append(f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\n"
                       f"WARC-Date: 2026-01-01T00:00:00Z\r\nContent-Type: application/http; msgtype=response\r\n"
                       f"Content-Length: {len(http)}\r\n\r\n".encode() + http + b"\r\n\r\n")
    return b"".join(records)


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    page = "<html><body><nav>menu</nav><article><p>A page in gr\u00fcn.</p></article></body></html>"
    good = lines_of([{"id": "one", "text": "first"}, {"txt": "x"}, {"text": "second"}])
    (folder / "a.jsonl").write_bytes(good + b"{\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines_of([{"text": "third"}, {"text": " "}])))
    (folder / "c.jsonl.zst").write_bytes(zstd(lines_of([{"text": "fourth"}])) + zstd(lines_of([{"text": "fifth"}])))
    (folder / "d.txt").write_bytes(b"sixth\nstill\n\n\xff\xfe\n\nseventh\n")
    parquet.write_table(pyarrow.table({"id": [7, 8], "text": ["eighth", None]}), folder / "e.parquet")
    (folder / "f.warc.gz").write_bytes(gzip.compress(warc_of([
        ("http://a/", 200, "text/html; charset=iso-8859-1", page.encode("iso-8859-1")),
        ("http://b/", 404, "text/html", page.encode()), ("http://c/", 200, "image/png", b"x")])))
    many = lines_of([{"text": f"number {i * i}"} for i in range(5000)])
    (folder / "g.jsonl.gz").write_bytes(gzip.compress(many)[:-2000])
    (folder / "h.jsonl.zst").write_bytes(zstd(lines_of([{"text": "lost"}]))[:-5])
    return folder


def test_every_format_is_read_and_nothing_is_lost_silently(raw, tmp_path):
    collect.run(collect.Options(input=(str(raw),), output=str(tmp_path / "out")))
    rows = rows_of(tmp_path / "out")
    assert [row["text"] for row in rows[:8]] == [
        "first", "second", "third", "fourth", "fifth", "sixth\nstill", "seventh", "eighth"]
    assert [row["id"] for row in rows[:3]] == ["one", "a.jsonl:3", "b.jsonl.gz:1"]
    assert (rows[8]["id"], rows[8]["text"], rows[8]["place"]) == ("http://a/", "A page in grün.", "f.warc.gz:1")
    assert rows[9]["text"] == "number 0"
    assert 100 < len(rows) < 5009
    dropped = dropped_of(tmp_path / "out")
    assert [(one["place"], one["reason"]) for one in dropped] == [
        ("a.jsonl:2", "no text"), ("a.jsonl:4", "not JSON"), ("b.jsonl.gz:2", "empty text"), ("d.txt:4", "not UTF-8"),
        ("e.parquet:2", "no text"), ("f.warc.gz:2", "HTTP status is not 200"), ("f.warc.gz:3", "not an HTML page"),
        (f"g.jsonl.gz:{len(rows) - 9}", "file damaged from here on"), ("h.jsonl.zst:0", "file damaged from here on")]
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert counts["came in"] == counts["documents"] + counts["dropped"] == len(rows) + len(dropped)
    assert counts["reasons"]["no text"] == 2


@pytest.mark.parametrize("name", ["big.jsonl", "big.txt"])
def test_pieces_of_a_large_file_hold_each_document_once(tmp_path, name):
    texts = [f"document {number}\n" * (number % 40 + 1) + "x" * (number * 7919 % 4096) for number in range(900)]
    data = lines_of([{"text": text} for text in texts]) if name == "big.jsonl" else "\n\n".join(texts).encode()
    (tmp_path / name).write_bytes(data)
    plan = list(make_plan([tmp_path / name], 50_000))
    assert len(plan) > 20
    folder = collect.DocumentFolder(tmp_path / "out", {"kind": "documents"})
    for index in range(len(plan)):
        collect.write_block(folder, plan, index)
    folder.finish(len(plan), {}, {})
    rows = rows_of(tmp_path / "out")
    assert [row["text"].rstrip("\n") for row in rows] == [text.rstrip("\n") for text in texts]
    file, _, line = rows[500]["place"].rpartition(":")
    rest = data[int(file.partition("@")[2]):].split(b"\n")[int(line) - 1:]
    assert texts[500].split("\n")[0] in rest[0].decode()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """WordNet's entries in documents of some fifty words and more; with repeats, near repeats and other languages."""
    entries = [f"{entry.opening} {entry.gloss}." for entry in load_entries(CORPUS, 160)[:3000]]
    texts = [" ".join(entries[first : first + 8]) for first in range(0, 3000, 8)]
    texts += [texts[3], texts[5] + " Once more.", texts[3].upper(), "short", "Das ist ein deutscher Satz. " * 20]
    folder = tmp_path_factory.mktemp("corpus")
    rows = [{"id": f"d{number}", "text": text} for number, text in enumerate(texts)]
    (folder / "a.jsonl").write_bytes(lines_of(rows))
    collect.run(collect.Options(input=(str(folder / "a.jsonl"),), output=str(folder / "documents")))
    return folder, texts


def test_filter_and_duplicates_and_what_is_listed_as_dropped(corpus, tmp_path):
    folder, texts = corpus
    filtering.run(filtering.Options(input=str(folder / "documents"), output=str(tmp_path / "kept")))
    rows, dropped = rows_of(tmp_path / "kept"), dropped_of(tmp_path / "kept")
    assert {row["language"] for row in rows} == {"en"}
    assert [row["text"] for row in rows] == [texts[int(row["id"][1:])] for row in rows]
    reasons = {one["id"]: (one["reason"], one["value"]) for one in dropped}
    assert len(rows) + len(reasons) == len(texts)
    assert reasons[f"d{len(texts) - 2}"] == ("too few words", 1)
    assert reasons[f"d{len(texts) - 1}"][0] in ("too little entropy", "other language")

    deduplicate.run(deduplicate.Options(input=str(tmp_path / "kept"), output=str(tmp_path / "unique")))
    found = {one["id"]: (one["reason"], one["kept"]) for one in dropped_of(tmp_path / "unique")}
    place = {row["id"]: f"block_000000.parquet:{number}" for number, row in enumerate(rows)}
    assert found == {f"d{len(texts) - 5}": ("repeats exactly", place["d3"]),
                     f"d{len(texts) - 4}": ("repeats nearly", place["d5"]),
                     f"d{len(texts) - 3}": ("repeats exactly", place["d3"])}
    assert [row["id"] for row in rows_of(tmp_path / "unique")] == [row["id"] for row in rows if row["id"] not in found]
    report = (tmp_path / "unique" / "largest_groups.txt").read_text()
    assert report.startswith("3 documents\n")
    assert f"d{len(texts) - 5}" in report
    assert not (tmp_path / "unique" / "stages").exists()


def test_what_drops_all_is_counted_and_the_next_job_takes_it(corpus, tmp_path):
    folder, texts = corpus
    rules = filtering.Rules(min_words=10**6)
    filtering.run(filtering.Options(input=str(folder / "documents"), output=str(tmp_path / "kept"), rules=rules))
    deduplicate.run(deduplicate.Options(input=str(tmp_path / "kept"), output=str(tmp_path / "unique")))
    assert rows_of(tmp_path / "unique") == []
    counts = json.loads((tmp_path / "kept" / "counts.json").read_text())
    assert (counts["documents"], counts["reasons"]) == (0, {"too few words": len(texts)})
    with pytest.raises(DataError, match="no usable document; the corpus is empty"):
        documents.Corpus([str(tmp_path / "unique")]).check()


def test_files_of_any_name_are_read_and_folders_are_none(tmp_path, capsys):
    (tmp_path / "raw" / "folder.txt").mkdir(parents=True)
    (tmp_path / "raw" / "more.jsonl.bz2").touch()
    (tmp_path / "raw" / os.fsdecode(b"n\xff.jsonl")).write_text('{"text": "good"}\n{\n')
    collect.run(collect.Options(input=(str(tmp_path / "raw"),), output=str(tmp_path / "out")))
    assert [(row["id"], row["text"]) for row in rows_of(tmp_path / "out")] == [("n\\udcff.jsonl:1", "good")]
    dropped = dropped_of(tmp_path / "out")
    assert [(one["file"], one["reason"]) for one in dropped] == [(f"{tmp_path}/raw/n\udcff.jsonl", "not JSON")]
    assert "1 files of unknown types are not read, such as 'more.jsonl.bz2'" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "message"), [
    ("sys:intern", "not a function of a module that is a"), ("os:path", "not a function of a module that is a file"),
    ("operator:length_hint", "must return a score from 0 to 1 for each"),
])
def test_a_quality_model_that_is_none_is_refused(corpus, tmp_path, name, message):
    options = filtering.Options(input=str(corpus[0] / "documents"), output=str(tmp_path / "out"), quality=name)
    with pytest.raises(ConfigError, match=message):
        filtering.run(options)


def test_the_jobs_do_without_torch(corpus, tmp_path):
    folder, _ = corpus
    steps = [folder / "a.jsonl", *(tmp_path / name for name in ("collect", "filter", "deduplicate"))]
    code = "\n".join(["import sys", *(
        f"from data_tools.{output.name} import main; main(['--input', '{source}', '--output', '{output}'])"
        for source, output in itertools.pairwise(steps)), "sys.exit('torch' in sys.modules)"])
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert (tmp_path / "deduplicate" / "manifest.json").exists()


def test_the_bytes_do_not_depend_on_parts_or_on_how_many_work(corpus, tmp_path):
    folder, _ = corpus
    options = {"input": str(folder / "documents"), "part_entries": 1000}
    command = [sys.executable, "-m", "launch.m3", "data", "deduplicate", "--input", options["input"], "--part-entries",
               "1000", "--output", str(tmp_path / "together")]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                 for _ in range(2)]
    deduplicate.run(deduplicate.Options(**options, output=str(tmp_path / "alone")))
    for process in processes:
        assert process.communicate()[1].decode().count("error") == 0
        assert process.returncode == 0
    alone, together = DocumentStore.open(tmp_path / "alone"), DocumentStore.open(tmp_path / "together")
    assert alone.hash == together.hash
    deduplicate.run(deduplicate.Options(input=options["input"], output=str(tmp_path / "one part")))
    one_part = DocumentStore.open(tmp_path / "one part")
    assert one_part.manifest.files == alone.manifest.files


def test_a_killed_job_goes_on_and_ends_with_the_same_bytes(tmp_path):
    data = lines_of([{"text": f"document {number} " + "word " * 200} for number in range(8000)])
    (tmp_path / "a.jsonl").write_bytes(data)
    command = [sys.executable, "-m", "launch.m3", "data", "collect", "--input", str(tmp_path / "a.jsonl"),
               "--block-megabytes", "1", "--output"]
    killed = subprocess.Popen([*command, str(tmp_path / "killed")], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "killed").glob("block_*.json")):
        assert killed.poll() is None
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    with pytest.raises(ArtifactError, match="unfinished"):
        documents.Corpus([str(tmp_path / "killed")])
    whole = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("block_*.json")}
    options = {"input": (str(tmp_path / "a.jsonl"),), "block_megabytes": 1}
    collect.run(collect.Options(**options, output=str(tmp_path / "killed")))
    assert {path: path.stat().st_mtime_ns for path in whole} == whole
    collect.run(collect.Options(**options, output=str(tmp_path / "whole"), workers=2))
    assert DocumentStore.open(tmp_path / "killed").hash == DocumentStore.open(tmp_path / "whole").hash
    before = (tmp_path / "whole" / "manifest.json").stat().st_mtime_ns
    collect.run(collect.Options(**options, output=str(tmp_path / "whole")))
    assert (tmp_path / "whole" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match="other inputs or settings"):
        collect.run(collect.Options(input=options["input"], block_megabytes=2, output=str(tmp_path / "whole")))


def longer_is_better(texts):
    return [min(1.0, len(text) / 2000) for text in texts]


def test_a_quality_model_of_ones_own(corpus, tmp_path):
    folder, _ = corpus
    options = {"input": str(folder / "documents"), "languages": (), "quality": f"{__name__}:longer_is_better"}
    filtering.run(filtering.Options(**options, output=str(tmp_path / "kept"), min_quality=0.35))
    rows, dropped = rows_of(tmp_path / "kept"), dropped_of(tmp_path / "kept")
    assert all(len(row["text"]) >= 0.35 * 2000 for row in rows)
    scores = longer_is_better(row["text"] for row in rows)
    assert [float(row["quality"]) for row in rows] == pytest.approx(scores, rel=1e-5)
    low = [one["value"] for one in dropped if one["reason"] == "low quality"]
    assert low
    assert max(low) < 0.35
    with pytest.raises(ConfigError, match=r"quality=no\.such:thing"):
        filtering.run(filtering.Options(**options | {"quality": "no.such:thing"}, output=str(tmp_path / "other")))


def test_later_steps_read_the_blocks_and_trust_their_hashes(corpus, tmp_path):
    folder, texts = corpus
    read = documents.Corpus([str(folder / "documents")])
    assert [document.text for document in read] == texts
    store = DocumentStore.open(folder / "documents")
    assert read.file_hashes[0]["sha256"] == store.manifest.files["block_000000.parquet"]["sha256"]
    train_tokenizer(texts[:50], 300, tmp_path / "tokenizer")
    references.run(references.Options(input=(str(folder / "documents"),), tokenizer=str(tmp_path / "tokenizer"),
                                      output=str(tmp_path / "references")))
    assert (tmp_path / "references" / "manifest.json").exists()


def test_a_damaged_block_is_refused_by_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of([{"text": f"document {number}"} for number in range(100)]))
    collect.run(collect.Options(input=(str(tmp_path / "a.jsonl"),), output=str(tmp_path / "documents")))
    path = tmp_path / "documents" / "block_000000.parquet"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    options = filtering.Options(input=str(tmp_path / "documents"), output=str(tmp_path / "x"))
    for read in (lambda: list(documents.Corpus([options.input])), lambda: filtering.run(options)):
        with pytest.raises(ArtifactError, match=r"block_000000\.parquet: checksum differs"):
            read()


def test_a_folder_of_something_else_is_not_taken_for_texts(tmp_path):
    folder = BlockFolder(tmp_path / "other", {"kind": "embeddings", "schema": 1})
    (folder.folder / "lines.jsonl").write_text('{"text": "a document"}\n')
    with pytest.raises(ArtifactError, match=r"other: no manifest\.json: unfinished, or not of kind documents"):
        documents.Corpus([str(folder.folder)])
    files = {"lines.jsonl": hash_file(folder.folder / "lines.jsonl")}
    for kind in ("tokens", "texts"):
        write_manifest(folder.folder, Manifest(kind=kind, schema=1, inputs={}, settings={}, files=files))
        if kind == "tokens":
            with pytest.raises(ArtifactError, match="other: is of kind tokens, not documents"):
                documents.Corpus([str(folder.folder)])
    assert documents.find_files([str(folder.folder)]) == [folder.folder / "lines.jsonl"]


@pytest.mark.parametrize("job", [collect, filtering, deduplicate])
def test_a_number_of_workers_that_cannot_be_writes_nothing(tmp_path, job):
    with pytest.raises(ConfigError, match="workers=0: must be at least 1"):
        job.main(["--input", str(tmp_path), "--output", str(tmp_path / "out"), "--workers", "0"])
    assert not (tmp_path / "out").exists()


def test_nothing_usable_is_a_mistake_in_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n[]\n")
    with pytest.raises(DataError, match=r"no usable document \(no text\)"):
        collect.run(collect.Options(input=(str(tmp_path / "a.jsonl"),), output=str(tmp_path / "out")))
    with pytest.raises(ArtifactError, match="not a folder of documents; make one with `m3 data collect`"):
        filtering.run(filtering.Options(input=str(tmp_path), output=str(tmp_path / "out")))
