"""Memory does not grow with the documents of a corpus, nor with the records that are set aside."""

import json
import tracemalloc
from pathlib import Path

import pytest

from data_tools import references
from data_tools.documents import Corpus
from megatron_m3.data.tokens import STRIDE, DocumentIds
from megatron_m3.tokenizer import train_tokenizer

BAD = 12_000


def write_ids(path: Path, count: int) -> DocumentIds:
    path.write_text("".join(json.dumps({"id": f"ä{number * number}"}) + "\n" for number in range(count)))
    return DocumentIds(path)


@pytest.mark.parametrize("count", [0, 1, STRIDE - 1, STRIDE, STRIDE + 1, 3 * STRIDE, 100_003])
def test_ids_are_those_of_their_lines(tmp_path: Path, count: int) -> None:
    ids = write_ids(tmp_path / "ids", count)
    assert len(ids) == count
    assert list(ids) == [f"ä{number * number}" for number in range(count)]
    assert ids[:2] == list(ids)[:2]
    for place in (-1, count):
        with pytest.raises(IndexError):
            ids[place]


def peak(work: object) -> int:
    """Most bytes that ``work`` holds."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_ids_of_three_times_the_documents_take_no_more_memory(tmp_path: Path) -> None:
    def read(count: int) -> int:
        write_ids(tmp_path / f"{count}", count)
        return peak(lambda: [DocumentIds(tmp_path / f"{count}")[place] for place in range(0, count, count // 7)])

    assert read(300_000) < read(100_000) + 20_000 < 6_000_000


@pytest.fixture(scope="module")
def mostly_bad(tmp_path_factory):
    """A corpus of two files of bad records but for a document each."""
    folder = tmp_path_factory.mktemp("bad")
    for name in "ab":
        lines = ['{"id": "x"}\n', "{\n"] * (BAD // 4)
        (folder / f"{name}.jsonl").write_text("".join([*lines, json.dumps({"id": name, "text": "some text"})]))
    train_tokenizer(["some text"] * 9, 300, folder / "tokenizer")
    return folder


def test_records_that_are_set_aside_are_not_held(mostly_bad, tmp_path):
    def read() -> None:
        corpus = Corpus([str(mostly_bad)])
        assert [document.id for document in corpus] == ["a", "b"]
        corpus.write_account(tmp_path, corpus.counts())

    read()  # what is imported stays out of the measurement
    assert peak(read) < 2_000_000
    check_account(mostly_bad, tmp_path)


def test_nor_are_those_of_all_blocks(mostly_bad, tmp_path):
    def run(name: str) -> None:
        references.run(references.Options(input=(str(mostly_bad),), tokenizer=str(mostly_bad / "tokenizer"),
                                          output=str(tmp_path / name)))

    run("first")
    assert peak(lambda: run("second")) < 3_000_000
    check_account(mostly_bad, tmp_path / "second")


def check_account(corpus: Path, folder: Path) -> None:
    entries = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert entries == [{"file": str(corpus / f"{name}.jsonl"), "line": line + 1,
                        "reason": "not JSON" if line % 2 else "no text"} for name in "ab" for line in range(BAD // 2)]
    counts = json.loads((folder / "counts.json").read_text())
    assert (counts["skipped"], counts["reasons"]) == (BAD, {"no text": BAD // 2, "not JSON": BAD // 2})
