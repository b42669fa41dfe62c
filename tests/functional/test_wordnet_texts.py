"""The corpus that comes with the project, and the demo's texts that are made from it."""

import gzip
import json

import pytest

from data_tools import wordnet, wordnet_corpus
from megatron_m3.errors import ConfigError, DataError


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_shipped_corpus_is_what_its_script_makes(tmp_path):
    noun = ("  1 This software and database is being provided to you  \n"
            "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is  \n"
            '00002684 04 n 02 object 0 physical_object 0 039 @ 00001930 n 0000 | a tangible; an entity; "full"\n')
    (tmp_path / "data.noun").write_text(noun)
    for name in ("one", "two"):
        wordnet_corpus.main(["--source", str(tmp_path), "--output", str(tmp_path / name)])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    entries = gzip.decompress((tmp_path / "one" / "entries.jsonl.gz").read_bytes()).decode().splitlines()
    expected = [("00001740", ["entity"], "that which is", "noun.Tops"),
                ("00002684", ["object", "physical object"], "a tangible; an entity", "noun.act")]
    assert [tuple(json.loads(entry).values()) for entry in entries] == expected
    shipped = gzip.decompress((wordnet.CORPUS / "entries.jsonl.gz").read_bytes()).decode().splitlines()
    assert len(shipped) == 82115
    assert json.loads(shipped[0])["words"] == ["entity"]
    (tmp_path / "data.noun").write_text(noun + "garbage\n")
    with pytest.raises(DataError, match=r"data\.noun:4: not a line of WordNet's"):
        wordnet_corpus.main(["--source", str(tmp_path), "--output", str(tmp_path / "three")])
    assert not (tmp_path / "three").exists()


def test_heldout_entries_are_in_the_references_and_not_in_the_training_texts(tmp_path):
    wordnet.main(["--output", str(tmp_path / "texts"), "--train-entries", "3000", "--heldout", "100",
                  "--other-entries", "200"])
    lines = {name: [json.loads(line) for line in (tmp_path / "texts" / f"{name}.jsonl").read_text().splitlines()]
             for name in ("train", "references", "heldout", "prompts")}
    train = "\n".join(line["text"] for line in lines["train"])
    references_ = {line["text"] for line in lines["references"]}
    assert len(lines["heldout"]) == 100
    for line in lines["heldout"]:
        assert line["context"] not in train
        assert line["target"].strip().lower() not in train.lower()
        (reference,) = line["references"]
        assert reference in references_
        word = line["context"].removeprefix("The word ").removesuffix(" means")
        assert f"{word}:{line['target']}" in reference.splitlines()
    said = [sentence.removeprefix("The word ") for sentence in train.splitlines()]
    known = {line for text in references_ for line in text.splitlines()}
    assert 2950 < len(said) < 3050
    assert all(sentence.replace(" means ", ": ", 1).removesuffix(".") in known for sentence in said)
    assert 3250 < len(known) < 3350
    assert len(lines["prompts"]) == 8
    assert sum(len(text.splitlines()) for text in references_) / len(references_) > 3


def test_the_texts_are_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        wordnet.main(["--output", str(tmp_path / name), "--train-entries", "500", "--heldout", "20"])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_more_heldout_entries_than_there_are_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="heldout=100000: only"):
        wordnet.main(["--output", str(tmp_path / "out"), "--train-entries", "100", "--heldout", "100000"])
    assert not (tmp_path / "out").exists()
