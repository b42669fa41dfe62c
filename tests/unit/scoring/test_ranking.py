"""Layers and heads by what they save: restricted passes against whole ones, and choices that no exchange betters."""

import dataclasses

import pytest
import torch

from megatron_m3.config import replace_fields
from megatron_m3.errors import ConfigError
from megatron_m3.evaluation.examples import Example
from tests.tiny_model import sentence, tiny_model

NUM_LAYERS, NUM_HEADS = 4, 2


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranking")
    return tiny_model(folder, std=0.15, memory__tokens="all", model__num_layers=str(NUM_LAYERS))


@pytest.fixture(scope="module")
def lines(loaded):
    encode = loaded.tokenizer.encode
    return [
        Example(
            line=seed,
            id=seed,
            context=encode(sentence(seed, 1 + seed % 4)),
            target=encode(sentence(seed + 50, 1 + seed % 3)),
            references=[encode(sentence(seed + 90, 5 + seed % 3))],
        )
        for seed in range(5)
    ]


@pytest.fixture(scope="module")
def reading(loaded, lines):
    from megatron_m3.evaluation.gated_reading import GatedReading

    counted = []
    reading = GatedReading(loaded, lines, batch_tokens=80, done=counted.append)
    assert sum(counted) == len(lines)
    assert len(reading.batches) > 1
    return reading


def heads_of(*layers):
    heads_LG = torch.zeros(NUM_LAYERS, NUM_HEADS, dtype=torch.bool)
    heads_LG[list(layers)] = True
    return heads_LG


@pytest.mark.parametrize("settled", [(), (0, 1, 2, 3), (1, 3)])
@pytest.mark.parametrize("layers", ["all", "1-3", "0,3", "2"])
def test_restricted_passes_give_the_losses_of_a_model_with_those_memory_layers(loaded, lines, reading, settled, layers):
    from megatron_m3.evaluation.scoring import Scorer

    config = replace_fields(loaded.config, {"memory.layers": layers})
    scores = Scorer(dataclasses.replace(loaded, config=config), "explicit").score(lines)
    truth = sum(one.nll for one in scores) / sum(one.tokens for one in scores)
    reading.settle(heads_of(*settled))
    assert reading.loss(heads_of(*config.memory_layers)) == pytest.approx(truth, rel=1e-5)


def test_every_head_counts(reading):
    reading.settle(heads_of(0, 1, 2, 3))
    losses = []
    for layer in range(NUM_LAYERS):
        for head in range(NUM_HEADS):
            heads_LG = heads_of(0, 1, 2, 3)
            heads_LG[layer, head] = False
            losses.append(round(reading.loss(heads_LG), 5))
    assert len(set(losses)) == NUM_LAYERS * NUM_HEADS


@pytest.mark.parametrize(("by_head", "target"), [(False, 2), (False, 4), (True, 5)])
def test_a_choice_is_what_was_measured_and_no_exchange_of_two_betters_it(reading, by_head, target):
    from megatron_m3.evaluation.layer_ranking import Ranking

    passes = []
    ranking = Ranking(reading, by_head=by_head, share=0.4, done=lambda: passes.append(1))
    choice = ranking.choose(target, rounds=20)
    assert len(choice.units) == target
    assert choice.path[0][0] == len(ranking.units)
    assert choice.path[-1][0] == target
    assert choice.loss <= choice.path[-1][1]
    assert set(choice.saves) == set(ranking.units)
    assert choice.loss == pytest.approx(reading.loss(ranking.mask(choice.units)), rel=1e-6)
    chosen, others = set(choice.units), set(ranking.units) - set(choice.units)
    for unit in chosen:
        assert choice.saves[unit] == pytest.approx(reading.loss(ranking.mask(chosen - {unit})) - choice.loss, abs=1e-5)
    for unit in others:
        assert choice.saves[unit] == pytest.approx(choice.loss - reading.loss(ranking.mask(chosen | {unit})), abs=1e-5)
    if not by_head:
        near = [reading.loss(ranking.mask(chosen - {old} | {new})) for old in chosen for new in others]
        assert choice.loss <= min(near, default=choice.loss) + 1e-6


def test_passes_are_foretold(reading):
    from megatron_m3.evaluation.layer_ranking import Ranking

    passes = []
    ranking = Ranking(reading, by_head=False, share=0.3, done=lambda: passes.append(1))
    ranking.choose(2)
    assert len(passes) <= ranking.planned_passes(2) <= len(passes) + len(ranking.units) + 10


def test_the_lines_are_not_overwritten(tmp_path):
    from launch.rank_layers import RankOptions, rank

    lines = tmp_path / "lines.jsonl"
    lines.write_text("{}")
    with pytest.raises(ConfigError, match="is the input file, which would be lost"):
        rank(RankOptions(checkpoint="none", input=str(lines), output=str(lines), num_layers=1))
