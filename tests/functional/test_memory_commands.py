"""m3 memory rank-layers and m3 memory frontier from a checkpoint on disk, as a user runs them."""

import dataclasses
import json

import pytest

from launch.m3 import main
from megatron_m3.errors import M3Error
from tests.tiny_model import joined_world, sentence, tiny_model


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A checkpoint and lines to score."""
    from megatron_m3.model.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("memory_commands")
    lines = [
        {"id": seed, "context": sentence(seed, 2), "target": " " + sentence(seed + 9, 2),
         "references": [sentence(seed + 20, 4)]}
        for seed in range(8)
    ]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with joined_world():
        loaded = tiny_model(folder, std=0.15)
        data = dataclasses.replace(loaded.config.data, tokenizer=str(folder / "tokenizer"))
        save_checkpoint(folder / "run", 7, [loaded.model], dataclasses.replace(loaded.config, data=data))
        yield {"run": folder / "run", "in": folder / "in.jsonl"}


def run(capsys, *words):
    capsys.readouterr()
    main([str(word) for word in words])
    return capsys.readouterr().out


def test_a_proposal_fits_its_budget_and_scores_as_the_ranking_says(paths, tmp_path, capsys):
    common = ["--checkpoint", paths["run"], "--input", paths["in"], "--dtype", "fp32", "--json"]
    rank = ["memory", "rank-layers", *common, "--output", tmp_path / "ranking.json", "--plot", tmp_path / "ranking.png"]
    # a record has 12 bytes beside its lists; one of 2 tokens of 2 * 16 bf16 numbers and 2 positions takes 132
    result = json.loads(run(capsys, *rank, "--bytes", 12 + 5 * 132 + 100, "--tokens", "2"))
    assert result == json.loads((tmp_path / "ranking.json").read_text())
    assert (tmp_path / "ranking.png").read_bytes().startswith(b"\x89PNG")
    layers, heads = result["layers"], result["heads"]
    assert (layers["record_bytes"], layers["key_value_bytes"]) == (12 + 4 * 132, 4 * 128)
    assert (heads["record_bytes"], heads["key_value_bytes"]) == (12 + 5 * 132, 5 * 128)
    score = ["score", *common, "--mode", "explicit", "--output", tmp_path / "out.jsonl", "--memory-tokens", "all"]
    chosen = [*score, "--memory-layers", layers["memory_layers"]]
    assert json.loads(run(capsys, *chosen))["nats_per_token"] == pytest.approx(layers["loss"], rel=1e-5)
    chosen = [*score, "--memory-layers", heads["memory_layers"], "--memory-heads", heads["memory_heads"]]
    assert json.loads(run(capsys, *chosen))["nats_per_token"] == pytest.approx(heads["loss"], rel=1e-5)


def test_a_frontier_is_a_table_and_a_picture_and_goes_on(paths, tmp_path, capsys):
    words = ["memory", "frontier", "--checkpoints", f"one={paths['run']}", "--input", paths["in"], "--output",
             tmp_path / "frontier.jsonl", "--plot", tmp_path / "frontier.png"]  # fmt: skip
    table = run(capsys, *words, "--points", "none layers=1,tokens=2").splitlines()
    assert [line.split()[:4] for line in table[1:]] == [["one", "none", "-", "-"],
                                                        ["one", "layers=1,tokens=2", "256", "276"]]
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "frontier.jsonl").read_text()
    more = run(capsys, *words, "--points", "none layers=1,tokens=2 text layers=1,tokens=2,mode=shuffled").splitlines()
    assert more[1].split()[-3:] == table[1].split()[-3:]
    after = (tmp_path / "frontier.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 4


def test_codecs_are_a_table_and_a_picture_and_go_on(paths, tmp_path, capsys):
    words = ["memory", "codecs", "--checkpoint", paths["run"], "--input", paths["in"], "--calibration", paths["in"],
             "--output", tmp_path / "codecs.jsonl", "--plot", tmp_path / "codecs.png", "--memory", "layers=1,tokens=2",
             "--error-lines", 3]  # fmt: skip
    table = run(capsys, *words, "--codecs", "SQ8 SQ4").splitlines()
    assert [line.split()[:2] for line in table[1:]] == [["SQ4", "8"], ["SQ8", "16"], ["none", "32"]]
    assert table[-1].split()[2:5] == ["0.0000"] * 3
    assert (tmp_path / "codecs.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "codecs.jsonl").read_text()
    results = json.loads(run(capsys, *words, "--codecs", "SQ8 SQ4 SQ6", "--json"))
    assert (tmp_path / "codecs.jsonl").read_text().startswith(before)
    assert [one["codec"] for one in results] == ["SQ4", "SQ6", "SQ8", "none"]
    exact = results[-1]["nats_per_token"]
    assert all(one["cost"] == pytest.approx(one["nats_per_token"] - exact, abs=1e-4) for one in results[:-1])
    assert results[0]["outputs"] > results[1]["outputs"] > results[2]["outputs"] > 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["rank-layers"], "num_layers: give either it or bytes"),
        (["rank-layers", "--num-layers", "2", "--bytes", "9"], "num_layers: give either it or bytes"),
        (["rank-layers", "--num-layers", "5"], "num_layers=5: the model has 4"),
        (["rank-layers", "--bytes", "20"], "bytes=20: one layer takes"),
        (["rank-layers", "--num-layers", "2", "--codec", "KLT99"], "codec=KLT99: takes at most 32 bytes"),
        (["frontier", "--points", "layers=9"], "memory.layers=9: the model has layers 0-3"),
        (["frontier", "--points", "layers=1,codec=PQ5x8"], "codec=PQ5x8: FAISS makes no standalone codec"),
        (["frontier", "--points", " "], "points: none are given"),
    ],
)
def test_a_wrong_command_is_refused_by_name_and_writes_nothing(paths, tmp_path, words, reason):
    checkpoint = ["--checkpoints", f"one={paths['run']}"] if words[0] == "frontier" else ["--checkpoint", paths["run"]]
    options = [*checkpoint, "--input", paths["in"], "--output", tmp_path / "out"]
    with pytest.raises(M3Error) as caught:
        main([str(word) for word in ["memory", *words, *options]])
    assert str(caught.value).startswith(reason)
    assert not (tmp_path / "out").exists()
