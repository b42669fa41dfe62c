"""Edited knowledge bases: ids stay, unchanged blocks are shared, and deleted references are never found."""

import json

import numpy as np
import pytest

from megatron_m3.errors import ArtifactError, ConfigError, DataError
from megatron_m3.references import ReferenceStore, format_ids, parse_ids
from tests.tiny_model import sentence


def write(path, count, seed, words=7):
    lines = [json.dumps({"id": f"{seed}:{place}", "text": sentence(seed + place, words)}) for place in range(count)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer and a knowledge base R of 40 references in blocks of 8."""
    from data_tools.references import main
    from megatron_m3.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("edits")
    train_tokenizer([sentence(seed, 200) for seed in range(20)], 512, folder / "tokenizer")
    for name, count, seed in (("R", 39, 0), ("S", 10, 500)):
        main(["--input", str(write(folder / f"{name}.jsonl", count, seed)), "--tokenizer", str(folder / "tokenizer"),
              "--output", str(folder / name), "--reference-length", "16", "--block-size", "8"])
    return folder


@pytest.fixture
def edit(folder, tmp_path):
    """Edit a knowledge base: edit(name, output, *options) -> the store."""
    from data_tools.edit_references import main

    def edit(name, output, *options):
        words = [str(word) for word in options]
        words += ["--tokenizer", str(folder / "tokenizer")] if {"--add", "--replace"} & set(words) else []
        main(["--references", str(folder / name), "--output", str(tmp_path / output), *words])
        return ReferenceStore.open(tmp_path / output, check=True)

    return edit


def all_of(store):
    return [(store.text(id), store.source(id), store.tokens([id])[0].tolist()) for id in range(len(store))]


@pytest.mark.parametrize(("text", "ids"), [("", []), ("3,7,20-22", [3, 7, 20, 21, 22]), ("5,5,1", [1, 5]),
                                           ("0-0", [0])])
def test_ids_as_text(text, ids):
    assert parse_ids(text).tolist() == ids
    assert parse_ids(format_ids(np.array(ids, np.int64))).tolist() == ids


def test_ids_are_written_in_ranges():
    assert format_ids([1, 2, 3, 7, 9, 10]) == "1-3,7,9-10"
    assert format_ids(range(0)) == ""
    for wrong in ("3-1", "x", "-4", "1.5"):
        with pytest.raises(ConfigError, match=f"ids={wrong}: not an id or a range"):
            parse_ids(wrong)
    with pytest.raises(ConfigError, match="not an id or a range"):
        parse_ids("1-" + "9" * 5000)
    with pytest.raises(DataError, match="delete=0-99999999999999: there is no reference 99999999999999, ids are 0-4"):
        parse_ids("0-99999999999999", "delete", 5)


def test_ids_stay_and_unchanged_blocks_are_shared(folder, edit, tmp_path):
    base = ReferenceStore.open(folder / "R")
    before = all_of(base)
    new, by = write(tmp_path / "new.jsonl", 5, 900), write(tmp_path / "by.jsonl", 2, 950)
    found = edit("R", "R2", "--replace", "9,12", "--by", by, "--delete", "10", "--add", new)
    assert all_of(base) == before
    after = all_of(found)
    assert len(after) == 44
    assert [id for id in range(39) if after[id] != before[id]] == [9, 10, 12]
    assert after[10] == ("", ("", 0), [[0] * 16])
    assert [after[id][:2] for id in (9, 12)] == [(sentence(950, 7), ("950:0", 0)), (sentence(951, 7), ("950:1", 0))]
    assert [after[39 + place][0] for place in range(5)] == [sentence(900 + place, 7) for place in range(5)]
    shared = [index for index in range(6) if (found.folder / f"block_{index:06d}.safetensors").stat().st_nlink > 1]
    assert shared == [0, 2, 3]
    assert found.lengths().tolist() == [len(found.tokens([id])[0][0].nonzero()[0]) for id in range(44)]
    assert found.block_size == base.block_size


def test_a_store_knows_what_was_done_since_any_store_before(folder, edit, tmp_path):
    base = ReferenceStore.open(folder / "R")
    one = edit("R", "one", "--delete", "3,7")
    two = edit(one.folder, "two", "--add", write(tmp_path / "new.jsonl", 2, 900), "--replace", "7", "--by",
               write(tmp_path / "by.jsonl", 1, 950))
    assert [(step.added, step.replaced, step.deleted) for step in two.edits_since(base.hash)] == [
        ("", "", "3,7"), ("39-40", "7", "")]
    assert [step.ids.tolist() for step in two.edits_since(one.hash)] == [[7, 39, 40]]
    assert two.edits_since(two.hash) == ()
    with pytest.raises(ArtifactError, match=r"is not the knowledge base .*, nor an edited one of it"):
        one.edits_since(two.hash)
    assert two.text(7) == sentence(950, 7)


def test_joining_another_store(folder, edit):
    other = ReferenceStore.open(folder / "S")
    joined = edit("R", "RS", "--append", folder / "S")
    assert all_of(joined) == all_of(ReferenceStore.open(folder / "R")) + all_of(other)
    assert (joined.edits[-1].added, joined.edits[-1].appended) == ("39-48", other.hash)


def test_a_document_is_deleted_and_found_no_more(folder, edit):
    found = edit("R", "less", "--delete-document", "0:4")
    assert np.flatnonzero(found.lengths() == 0).tolist() == [4]
    with pytest.raises(DataError, match="no reference is of a document '0:4'"):
        found.ids_of_document("0:4")
    with pytest.raises(DataError, match="no reference is of a document ''"):
        found.ids_of_document("")


def test_the_same_job_twice_does_nothing_and_another_is_refused(folder, edit, capsys, tmp_path):
    edit("R", "out", "--delete", "3")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    edit("R", "out", "--delete", "3")
    assert "made already" in capsys.readouterr().out
    with pytest.raises(ArtifactError, match="made from other inputs or settings"):
        edit("R", "out", "--delete", "4")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(("options", "error", "said"), [
    ((), ConfigError, "nothing to do"),
    (("--delete", "39"), DataError, "delete=39: there is no reference 39, ids are 0-38"),
    (("--delete", "3", "--replace", "3", "--by", "two"), ConfigError, "reference 3 is to be replaced and"),
    (("--replace", "3", "--by", "two"), DataError, "by: 2 usable documents for 1 references to replace"),
    (("--replace", "3", "--by", "long"), DataError, "by: document 950:0 has .* tokens, a reference at most 16"),
    (("--replace", "3"), ConfigError, "--replace takes the new texts with --by"),
    (("--append", "S", "--delete", "3"), ConfigError, "not together with delete"),
])
def test_a_mistake_is_named_and_nothing_is_written(folder, edit, tmp_path, options, error, said):
    given = {"two": write(tmp_path / "two.jsonl", 2, 950), "long": write(tmp_path / "long.jsonl", 1, 950, words=40),
             "S": folder / "S"}
    with pytest.raises(error, match=said):
        edit("R", "out", *(given.get(word, word) for word in options))
    assert not (tmp_path / "out").exists()


def test_deleted_references_are_never_found(edit, tmp_path):
    """Even where all others are as far from the question as a vector of zeros, or there are no others left."""
    from data_tools import embed, index
    from megatron_m3.retrieval.index import VectorIndex

    store = edit("R", "few", "--delete", "0-33")
    made = {name: str(tmp_path / name) for name in ("embeddings", "index")}
    embed.main(["--references", str(store.folder), "--output", made["embeddings"], "--size", "32"])
    index.main(["--references", str(store.folder), "--embeddings", made["embeddings"], "--output", made["index"]])
    opened = VectorIndex.open(made["index"], references_hash=store.hash)
    question = opened.embedder().embed([sentence(36, 7)])
    questions = np.concatenate([question, -question])
    scores, ids, valid = opened.search(questions, 7)
    assert valid.tolist() == [[True] * 5 + [False] * 2] * 2
    assert {tuple(sorted(row[:5])) for row in ids.tolist()} == {(34, 35, 36, 37, 38)}
    assert (ids[0, 0], ids[1, 4]) == (36, 36)
    assert scores[1, 4] < 0
    dropped = opened.search_filtered(questions, 5, lambda row, ids: ids == 36)
    assert dropped.valid.sum(1).tolist() == [4, 4]
