"""The cost model gives the paper's figures for the paper's shape, and follows its formulas for any other."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_m3.config import Config, get_recipe, replace_fields
from megatron_m3.evaluation.cost import TFLOP, bank_size, cost_table, format_bytes, knowledge_cost

REFERENCES = 112_000_000


@pytest.fixture
def paper() -> Config:
    return get_recipe("m3-2b")


def test_the_papers_costs(paper: Config) -> None:
    cost = knowledge_cost(paper)
    assert f"{cost.write_parameters / TFLOP:.5g}" == "2.2385"
    assert f"{cost.write_memory / TFLOP:.5g}" == "0.30818"
    assert f"{cost.read_memory / TFLOP:.5g}" == "0.00014418"
    assert f"{cost.read_text / TFLOP:.5g}" == "0.62422"


def test_the_papers_advantage_interval(paper: Config) -> None:
    low, high = knowledge_cost(paper).interval
    assert f"{low:.4g}" == "0.4938"
    assert f"{high:.5g}" == "13388"


@pytest.mark.parametrize(("end", "pair"), [(0, (1, 2)), (1, (0, 1))])
def test_costs_are_equal_at_the_ends_of_the_interval(paper: Config, end: int, pair: tuple[int, int]) -> None:
    cost = knowledge_cost(paper)
    totals = cost.totals(cost.interval[end])
    assert totals[pair[0]] == pytest.approx(totals[pair[1]])
    assert min(totals) == pytest.approx(totals[pair[0]])


@pytest.mark.parametrize("recipe", ["m3-2b", "m3-0.9b", "demo", "tiny"])
def test_costs_follow_appendix_a(recipe: str) -> None:
    """The formulas as printed, with d = H d_h as in the paper, for memory layers in the first half."""
    config = get_recipe(recipe)
    model, memory = config.model, config.memory
    depth, d, d_h, G = model.num_layers, model.hidden_size, model.head_size, model.num_kv_heads
    W, V, depth_mem = model.ffn_size, model.padded_vocab_size, len(config.memory_layers)
    l_ref, l_chunk, l_mem = memory.reference_length, memory.chunk_length, memory.num_kept_tokens
    l_train = config.data.sequence_length
    assert d == model.num_heads * d_h
    attention = 2 * d**2 + 2 * d * d_h * G
    cost = knowledge_cost(config)
    assert cost.write_parameters == pytest.approx(
        3 * 2 * (depth * (l_ref * (attention + 3 * d * W) + 2 * l_ref * (l_train / 2) * d) + l_ref * V * d)
    )
    assert cost.write_memory == pytest.approx(
        2 * (depth_mem * (l_ref * attention + 2 * (l_ref**2 / 2) * d)
             + (depth_mem - 1) * l_ref * 3 * d * W + depth_mem * l_ref**2 * d)
    )
    assert cost.read_memory == pytest.approx(2 * depth_mem * 2 * l_chunk * l_mem * d)
    assert cost.read_text == pytest.approx(
        2 * (depth * (l_ref * attention + 2 * l_ref * (l_ref / 2 + l_chunk) * d) + (depth - 1) * l_ref * 3 * d * W)
    )


def test_writing_goes_as_deep_as_the_last_memory_layer(paper: Config) -> None:
    band = knowledge_cost(replace_fields(paper, {"memory.layers": "11-32"}))
    first = knowledge_cost(paper)
    assert band.write_memory > 1.4 * first.write_memory
    assert band.read_memory == first.read_memory


def test_the_papers_bank_sizes(paper: Config) -> None:
    size = bank_size(paper, 14)
    assert (size.dense, size.sparse, size.compressed) == (72_089_600, 450_560, 39_424)
    totals = [format_bytes(count * REFERENCES) for count in (size.dense, size.sparse, size.compressed)]
    assert totals == ["7.17 PiB", "45.9 TiB", "4.02 TiB"]
    assert (size.factors["layers"], size.factors["heads"], size.factors["tokens"]) == (2, 5, 16)
    assert size.dense / size.sparse == 160
    assert f"{size.dense / size.compressed:.3g}" == "1.83e+03"


def test_heads_that_hold_no_memory_cost_nothing(paper: Config) -> None:
    some = replace_fields(paper, {"memory.layers": "0-1", "memory.heads": "0:0,3;1:1"})
    whole = replace_fields(paper, {"memory.layers": "0-1"})
    assert bank_size(some, 14).compressed == 3 * 2 * 8 * 14
    assert 16 * bank_size(some, 14).sparse == 3 * bank_size(whole, 14).sparse
    assert np.prod(list(bank_size(some, 14).factors.values())) == pytest.approx(72_089_600 / (3 * 2 * 8 * 14))
    assert 16 * knowledge_cost(some).read_memory == pytest.approx(3 * knowledge_cost(whole).read_memory)


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 B"), (999, "999 B"), (1024, "1 KiB"), (1000, "0.977 KiB"), (5 * 1024**4, "5 TiB"),
])
def test_bytes_are_in_binary_units(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_the_table_shows_every_figure(paper: Config) -> None:
    table = cost_table("m3-2b", knowledge_cost(paper), bank_size(paper, 14), REFERENCES)
    for figure in ("2.2385", "0.30818", "0.00014418", "0.62422", "0.4938 < uses < 13388", "72,089,600", "4.02 TiB"):
        assert figure in table


def test_the_command_prints_json_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from matplotlib import image

    from launch.cost import main

    main(["--recipe", "m3-2b", "--json", "--plot", str(tmp_path / "cost.png")])
    figures = json.loads(capsys.readouterr().out)
    assert figures["flops"]["write_memory"] == knowledge_cost(get_recipe("m3-2b")).write_memory
    assert figures["bytes_per_reference"]["compressed"] == 39_424
    pixels = image.imread(tmp_path / "cost.png")[..., :3]
    assert pixels.shape == (750, 1200, 3)
    for colour in ((47, 111, 183), (42, 157, 98), (217, 112, 43)):
        distance = abs(pixels * 255 - colour).max(axis=-1)
        assert (distance < 3).sum() > 500


def test_the_command_takes_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    from launch.cost import main

    main(["--recipe=m3-2b", "--memory.tokens", "16", "--model.num-kv-heads", "4", "--json", "--references", "10"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["bytes_per_reference"]["compressed"] == 39_424
    assert figures["model"]["num_kv_heads"] == 4
    assert figures["references"] == 10


def test_the_command_tells_how_fast_a_cluster_trains(capsys: pytest.CaptureFixture[str]) -> None:
    from launch.cost import main

    main(["--recipe=m3-2b", "--gpus", "64", "--peak-tflops", "1000", "--utilisation", "0.5", "--json"])
    warmup, continual = json.loads(capsys.readouterr().out)["training"]
    # 6 operations a token and non-embedding or output parameter, and attention over half of 2048 tokens
    tokens, model = 2048 * 2048, get_recipe("m3-2b").model
    weights = model.num_non_embedding_parameters + 60_416 * 3200
    expected = 6 * tokens * weights + 3 * 44 * tokens * 2048 / 2 * 4 * 3200
    assert warmup["pflops_per_step"] == pytest.approx(expected / 1e15, rel=1e-2)
    assert warmup["steps_per_second"] == pytest.approx(64 * 1e15 * 0.5 / expected, rel=1e-2)
    assert warmup["tokens_per_second"] == pytest.approx(warmup["steps_per_second"] * tokens)
    assert continual["steps_per_second"] < warmup["steps_per_second"]
    assert warmup["checkpoint_bytes"] == 14 * (weights + 60_416 * 3200)
    main(["--recipe=m3-2b", "--gpus", "64"])
    assert "utilisation of 40 %" in capsys.readouterr().out
