"""Statistics of a bank against plain loops over its memories, and what `m3 bank inspect` tells of an edited one."""

import json
from collections import Counter

import numpy as np
import pytest

from launch.m3 import main
from tests.edited_banks import copy_of, delete, open_bank


@pytest.fixture
def said(capsys):
    """Run a command: said(word, ...) -> what it printed."""

    def said(*words):
        capsys.readouterr()
        main([str(word) for word in words])
        return capsys.readouterr().out

    return said


def test_statistics_are_those_of_the_memories(built, references, folder, loaded, tmp_path, said):
    bank = copy_of(built / "none", tmp_path)
    delete(bank, [8, 20])
    words = ["bank", "stats", "--bank", bank, "--references", references.folder, "--tokenizer", folder / "tokenizer",
             "--sample", 500]
    stats = json.loads(said(*words, "--json", "--plot", tmp_path / "bank.png"))
    assert (tmp_path / "bank.png").read_bytes().startswith(b"\x89PNG")
    opened = open_bank(bank)
    memories, (tokens, lengths) = opened.read(range(400)), references.tokens(range(400))
    kept, places, norms, count = Counter(), np.zeros((2, 16)), np.zeros((2, 2, 2)), 0
    for id in range(400):
        number = int(memories.num_kept[id])
        count += number
        for layer, head in np.ndindex(2, 2):
            for place in memories.positions[id, layer, head, :number].tolist():
                places[layer, int(place / lengths[id] * 16)] += 1
                kept[loaded.tokenizer.decode([int(tokens[id, place])])] += 1
            for part in (0, 1):
                norms[part, layer, head] += sum(map(float, memories.kv[id, layer, part, head, :number].norm(dim=-1)))
    assert np.allclose(stats["places"], places / places.sum(1, keepdims=True), atol=1e-4)
    assert np.allclose([stats["key_norms"], stats["value_norms"]], norms / count, atol=1e-3)
    assert [one["kept"] for one in stats["tokens"]] == sorted(kept.values(), reverse=True)[:20]
    assert all(kept[one["text"]] == one["kept"] for one in stats["tokens"])
    assert (stats["sample"], stats["deleted"], stats["empty"], stats["edited"]) == (400, 2, 2, 2)
    assert stats["kept_tokens"] == {str(number): times for number, times in Counter(memories.num_kept.tolist()).items()}
    files = sum(entry["bytes"] for entry in opened.manifest.files.values())
    assert stats["bytes"] == files
    assert stats["parts"]["replaced and deleted records"] == 3 * opened.record_bytes
    for part in (0, 1):
        assert sum(shares[part] for shares in stats["kinds"].values()) == pytest.approx(1, abs=1e-3)
    table = said(*words)
    assert "400 references" in table
    assert "of 400 references drawn, 2 keep 0, 398 keep 4 tokens" in table
    assert "as shares of the longest" in said("bank", "stats", "--bank", bank)


@pytest.mark.parametrize(("text", "kind"), [
    (" house", "start of a word"), ("ing", "inside a word"), ("\ufffd", "inside a word"), ("12", "number"),
    (" (", "punctuation"), ("\n", "space"),
])
def test_kinds_of_tokens(text, kind):
    from megatron_m3.evaluation.bank_stats import kind_of

    assert kind_of(text) == kind


def test_inspect_tells_edits_and_the_error_of_a_memory(built, references, run, tmp_path, said):
    one = ["--references", references.folder, "--checkpoint", run, "--reference", 8]
    exact = said("bank", "inspect", "--bank", built / "none", *one)
    assert exact.count("error of key 0.0% of value 0.0%") == 4
    coded = said("bank", "inspect", "--bank", built / "coded", *one)
    assert coded.count(" error of key ") == 4
    assert "error of key 0.0%" not in coded
    bank = copy_of(built / "coded", tmp_path)
    delete(bank, [8, 9])
    facts = json.loads(said("bank", "inspect", "--bank", bank, "--json"))
    assert (facts["edits"], facts["edited"], facts["deleted"]) == (0, 2, 2)
    assert "deleted: its memory holds no token" in said("bank", "inspect", "--bank", bank, *one)
