"""The frontier: points as text, the losses of m3 score, bytes of the bank's record, and going on after a stop."""

import dataclasses
import json

import pytest
import torch

from megatron_m3.config import replace_fields
from megatron_m3.errors import ConfigError, DataError
from megatron_m3.evaluation.examples import Example, exchange_references
from tests.tiny_model import sentence, tiny_model

SPARSE = "layers=1-2,tokens=3"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("frontier"), memory__tokens="all", memory__layers="all")


@pytest.fixture(scope="module")
def lines(loaded):
    encode = loaded.tokenizer.encode
    return [
        Example(line=seed, id=seed, context=encode(sentence(seed, seed % 4)), target=encode(sentence(seed + 50, 2)),
                references=[encode(sentence(seed + 90 + place, 6)) for place in range(1 + seed % 2)])
        for seed in range(7)
    ]  # fmt: skip


def frontier(loaded, lines, names, monkeypatch):
    from megatron_m3.evaluation import frontier as module

    monkeypatch.setattr(module, "BLOCK_LINES", 3)
    points = [module.Point.parse(name) for name in names]
    return module.Frontier(loaded, points, lines, lines, seed=5, identity=["model", "lines"], label="tiny")


@pytest.mark.parametrize(
    ("text", "name", "mode", "codec"),
    [
        ("none", "none", "none", "none"),
        ("text", "text", "text", "none"),
        ("tokens=8,layers=8-10,14", "layers=8-10,14,tokens=8", "explicit", "none"),
        ("layers=1,codec=OPQ16_64,PQ16x8,tokens=2", "layers=1,tokens=2,codec=OPQ16_64,PQ16x8", "explicit",
         "OPQ16_64,PQ16x8"),
        ("mode=shuffled,layers=1", "layers=1,mode=shuffled", "shuffled", "none"),
    ],
)  # fmt: skip
def test_points_are_read_and_named(text, name, mode, codec):
    from megatron_m3.evaluation.frontier import Point

    point = Point.parse(text)
    assert (point.name, point.mode, point.codec) == (name, mode, codec)
    assert Point.parse(point.name) == point


@pytest.mark.parametrize("text", ["nothing", "layers=1,mode=text", "8-24", "layers=1,,tokens"])
def test_other_words_are_no_point(text):
    from megatron_m3.evaluation.frontier import Point

    with pytest.raises(ConfigError, match="points: "):
        Point.parse(text)


def test_losses_are_those_of_scoring_each_point_alone(loaded, lines, tmp_path, monkeypatch):
    from megatron_m3.evaluation.frontier import ResultFile, collect
    from megatron_m3.evaluation.scoring import Scorer

    names = ["none", "text", SPARSE, "layers=all,tokens=all", f"{SPARSE},mode=shuffled", f"{SPARSE},codec=SQ4"]
    one, results, done = frontier(loaded, lines, names, monkeypatch), ResultFile(tmp_path / "out.jsonl"), []
    one.run(results, done.append)
    assert sum(done) == len(lines) * len(names)
    found = collect(one, results)
    assert [result.point for result in found] == names
    for point, result in zip(one.points, found, strict=True):
        scorer = Scorer(dataclasses.replace(loaded, config=point.config(loaded.config)), point.mode)
        if point.codec != "none":
            scorer.train_codec(point.codec, scorer.draw_sample(lines, 5))
        scores = scorer.score(exchange_references(lines, 5) if point.mode == "shuffled" else lines)
        tokens = sum(score.tokens for score in scores)
        assert result.tokens == tokens
        assert result.nats_per_token == pytest.approx(sum(score.nll for score in scores) / tokens, abs=1e-4)
        assert 0 < result.standard_error < 1
    assert len({round(result.nats_per_token, 4) for result in found}) == len(names)


def test_a_stopped_run_goes_on_and_scores_nothing_twice(loaded, lines, tmp_path, monkeypatch):
    from megatron_m3.evaluation.frontier import ResultFile, collect

    path = tmp_path / "out.jsonl"
    whole = frontier(loaded, lines, ["none", SPARSE], monkeypatch)
    whole.run(ResultFile(path), lambda count: None)
    truth, rows = collect(whole, ResultFile(path)), path.read_bytes().splitlines(keepends=True)
    assert len(rows) == 6
    path.write_bytes(b"".join(rows[:2]) + rows[2][:20])  # killed while writing
    again, done = ResultFile(path), []
    whole.run(again, done.append)
    assert sum(done) == 2 * len(lines) - 2 * 3
    assert collect(whole, again) == truth
    assert path.read_bytes().splitlines(keepends=True)[:2] == rows[:2]
    whole.run(ResultFile(path), done.append)
    assert sum(done) == 2 * len(lines) - 2 * 3


def test_other_settings_of_the_checkpoint_are_other_results(loaded, lines, tmp_path, monkeypatch):
    from megatron_m3.evaluation.frontier import ResultFile

    results = ResultFile(tmp_path / "out.jsonl")
    frontier(loaded, lines, ["layers=1"], monkeypatch).run(results, lambda count: None)
    fewer = dataclasses.replace(loaded, config=replace_fields(loaded.config, {"memory.tokens": "2"}))
    assert frontier(fewer, lines, ["layers=1"], monkeypatch).missing(results)
    assert not frontier(loaded, lines, ["layers=1"], monkeypatch).missing(results)


def test_other_lines_get_other_references_in_the_same_block(loaded, lines, tmp_path, monkeypatch):
    from megatron_m3.evaluation.frontier import ResultFile

    results, points = ResultFile(tmp_path / "out.jsonl"), ["none", f"{SPARSE},mode=shuffled"]
    frontier(loaded, lines[:3], points, monkeypatch).run(results, lambda count: None)
    first = frontier(loaded, lines, points, monkeypatch).missing(results)[0]
    assert (first[0], [point.mode for point in first[1]]) == (range(3), ["shuffled"])


def test_a_file_of_something_else_is_refused(tmp_path):
    from megatron_m3.evaluation.frontier import ResultFile

    (tmp_path / "out.jsonl").write_text(json.dumps({"id": 1}) + "\n")
    with pytest.raises(DataError, match=r"out\.jsonl, line 1"):
        ResultFile(tmp_path / "out.jsonl")


def test_bytes_are_those_of_the_banks_record(loaded):
    from megatron_m3.evaluation.frontier import Bytes, Point
    from megatron_m3.memory.record import RecordLayout

    config, model = Point.parse(SPARSE).config(loaded.config), loaded.config.model
    layout = RecordLayout(held_LG=torch.ones(2, model.num_kv_heads, dtype=torch.bool), num_kept_tokens=3, token_bytes=7)
    assert Bytes.of(config, 7) == Bytes(key_values=layout.codes_bytes, record=layout.record_bytes)
    some = Point.parse(f"{SPARSE},heads=1:1;2:0,1").config(loaded.config)
    layout = RecordLayout(held_LG=torch.tensor([[False, True], [True, True]]), num_kept_tokens=3, token_bytes=7)
    assert Bytes.of(some, 7) == Bytes(key_values=layout.codes_bytes, record=layout.record_bytes)
