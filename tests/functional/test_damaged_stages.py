"""A byte that flips in what a job keeps until its end is found before it reaches the output, and made anew."""

import json
from pathlib import Path

import pytest

from data_tools import deduplicate, references, tokenize
from data_tools.document_store import DocumentFolder, DocumentStore
from data_tools.selection import Select
from megatron_m3.errors import ArtifactError
from megatron_m3.tokenizer import train_tokenizer
from tests.damage import flip_after

ARROW, RUN = "block_000000.arrow", "block_000001.safetensors"
DUPLICATES = [
    *(("hash", RUN, array) for array in ("key", "rest", "row", "edges", "sums")), ("hash", RUN, 20), ("hash", RUN, 1),
    *(("sign", RUN, array) for array in ("key", "row", "edges", "sums", "rows", "signatures", "row_sums")),
    ("sign", RUN, 20), ("sign", "block_000001.json", 30),
    *((stage, "block_000000.safetensors", array) for stage in ("exact", "near", "group")
      for array in ("document", "first")),
]
ROWS = [("rows", ARROW, 1000), ("rows", ARROW, 3), ("rows", ARROW, -20), ("rows", "000000_skipped.jsonl", 9)]


def text_of(number: int) -> str:
    return " ".join(f"word{number * 31 * place % 8191}" for place in range(60))


def contents(folder: Path) -> dict[str, bytes]:
    assert not (folder / "stages").exists()
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Two blocks; the second repeats much of the first, exactly and nearly. And what is left without the repeats."""
    folder = tmp_path_factory.mktemp("documents")
    store = DocumentFolder(folder / "input", {"kind": "test"})
    blocks = [map(text_of, range(40)), [text_of(number) + " more" * (number % 2) for number in range(20, 60)]]
    for index, texts in enumerate(blocks):
        with store.block(index, ("id", "text", "place")) as writer:
            writer.write_rows([(f"{index}:{row}", text, f"a:{row}") for row, text in enumerate(texts)])
    store.finish(2, {}, {})
    deduplicate.run(options(folder / "input", folder / "whole"))
    assert json.loads((folder / "whole" / "counts.json").read_text())["reasons"] == {
        "repeats exactly": 10, "repeats nearly": 10}
    return folder / "input", contents(folder / "whole")


def options(source: Path, output: Path) -> deduplicate.Options:
    return deduplicate.Options(input=str(source), output=str(output))


@pytest.mark.parametrize(("stage", "file", "place"), DUPLICATES)
def test_stages_of_deduplicate(documents, tmp_path, monkeypatch, stage, file, place):
    source, whole = documents
    with monkeypatch.context() as patched:
        flip_after(patched, stage, file, place)
        with pytest.raises(ArtifactError, match=r"block_.*: damaged") as error:
            deduplicate.run(options(source, tmp_path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "manifest.json").exists()
    if file.endswith(".json"):
        assert "remove it and run the job again" in str(error.value)
        (tmp_path / "stages" / stage / file).unlink()
    deduplicate.run(options(source, tmp_path))
    assert contents(tmp_path) == whole
    DocumentStore.open(tmp_path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents, one of them bad, and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"id": f"d{number}", "text": text_of(number)}) for number in range(60)]
    (folder / "a.jsonl").write_text("\n".join(["bad", *lines]))
    (folder / "ids.txt").write_text("\n".join(f"d{number}" for number in range(0, 60, 2)))
    train_tokenizer(map(text_of, range(20)), 400, folder / "tokenizer")
    return folder


@pytest.mark.parametrize(("job", "stage", "file", "place"), [
    *((tokenize, *damage) for damage in ROWS), (tokenize, "joined", "block_000000.json", -20),
    *((references, *damage) for damage in ROWS), (references, "rows", "000000_found.npy", -1),
    (references, "listed", "block_000000.safetensors", -9),
])
def test_stages_of_a_corpus(corpus, tmp_path, monkeypatch, job, stage, file, place):
    def run(output: Path) -> dict[str, bytes]:
        more = {"select": Select(ids=str(corpus / "ids.txt")), "block_size": 32} if job is references else {}
        job.run(job.Options(input=(str(corpus / "a.jsonl"),), tokenizer=str(corpus / "tokenizer"), output=str(output),
                            **more))
        return contents(output)

    with monkeypatch.context() as patched:
        flip_after(patched, stage, file, place)
        with pytest.raises(ArtifactError, match=": damaged") as error:
            run(tmp_path / "out")
    assert "\n" not in str(error.value)
    if file.endswith(".json"):
        (tmp_path / "out" / "stages" / stage / file).unlink()
    assert run(tmp_path / "out") == run(tmp_path / "whole")
