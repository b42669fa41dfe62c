"""Lines to score: checked one by one, refused by file and line, and exchanged for mode shuffled."""

import json

import pytest

from megatron_m3.errors import DataError
from megatron_m3.evaluation.examples import exchange_references, read_examples
from megatron_m3.tokenizer import train_tokenizer

GOOD = {"id": "a", "context": "one two", "target": " three", "references": ["two one", "one"]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["one two three"] * 3, 300, tmp_path_factory.mktemp("examples") / "tokenizer")


def read(tmp_path, tokenizer, *lines, reads_references=True, reference_length=16):
    raw = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    (tmp_path / "in.jsonl").write_bytes(raw)
    return read_examples(
        tmp_path / "in.jsonl", tokenizer, reads_references=reads_references, reference_length=reference_length
    )


def test_parts_are_tokenized_separately_as_given(tmp_path, tokenizer):
    (example,) = read(tmp_path, tokenizer, GOOD, b"", b"  ")
    assert (example.line, example.id) == (1, "a")
    assert example.context == tokenizer.encode("one two")
    assert example.target == tokenizer.encode(" three")
    assert example.references == [tokenizer.encode("two one"), tokenizer.encode("one")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b'{"id": "\xff"}', "not UTF-8"),
        (b"[1]", "not an object"),
        (b'{"id": ' + b"[" * 200_000, "nested too deeply"),
        ({**GOOD, "id": None}, "id"),
        ({**GOOD, "id": True}, "id"),
        ({**GOOD, "context": 3}, "context"),
        ({key: value for key, value in GOOD.items() if key != "target"}, "target"),
        ({**GOOD, "target": ""}, "target is empty"),
        ({**GOOD, "references": "text"}, "references is not a list"),
        ({**GOOD, "references": ["one", 2]}, "reference 2"),
        ({**GOOD, "references": []}, "references is empty"),
        ({key: value for key, value in GOOD.items() if key != "references"}, "references is empty"),
        ({**GOOD, "references": ["one", ""]}, "reference 2 is empty"),
        ({**GOOD, "references": ["one", "x" * 40]}, "reference 2 has 40 tokens, the limit is 16"),
        (b'{"id": 1, "context": "\\ud800", "target": "one", "references": ["one"]}', "surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path, tokenizer, line, reason):
    with pytest.raises(DataError, match=f"in.jsonl, line 3: .*{reason}") as caught:
        read(tmp_path, tokenizer, GOOD, GOOD, line)
    assert "\n" not in str(caught.value)


def test_references_are_free_where_they_are_not_memories(tmp_path, tokenizer):
    lines = [{**GOOD, "references": []}, {**GOOD, "references": ["x" * 40]}]
    assert len(read(tmp_path, tokenizer, *lines, reads_references=False)) == 2


def test_an_empty_and_a_missing_file_are_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no lines"):
        read(tmp_path, tokenizer, b"\n")
    with pytest.raises(DataError, match="no such file"):
        read_examples(tmp_path / "none", tokenizer, reads_references=False, reference_length=16)


@pytest.mark.parametrize("count", [2, 3, 17])
def test_no_line_keeps_its_references_and_the_seed_decides(tmp_path, tokenizer, count):
    texts = [["x" * (place % 16 + 1)] * (place // 16 + 1) for place in range(count)]
    lines = [{**GOOD, "id": place, "references": references} for place, references in enumerate(texts)]
    examples = read(tmp_path, tokenizer, *lines)
    exchanged = exchange_references(examples, 7)
    assert [one.id for one in exchanged] == list(range(count))
    assert all(one.references != two.references for one, two in zip(examples, exchanged, strict=True))
    originals = sorted(str(one.references) for one in examples)
    assert sorted(str(one.references) for one in exchanged) == originals
    assert exchanged == exchange_references(examples, 7)
    if count == 17:
        assert exchanged != exchange_references(examples, 8)


def test_a_single_line_cannot_be_shuffled(tmp_path, tokenizer):
    with pytest.raises(DataError, match="two lines"):
        exchange_references(read(tmp_path, tokenizer, GOOD), 7)
