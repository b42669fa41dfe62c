"""Pipeline splits: no other one is better, and the time they are judged by is that of the schedule."""

import time
from itertools import combinations, pairwise

import numpy as np
import pytest

from megatron_m3.config import Config, get_recipe, replace_fields, split, split_search, stage_layers
from megatron_m3.config.pipeline_time import most_held, pipeline_time, stage_passes
from megatron_m3.config.split import ROUNDS, _cuts, chunk_costs, even_layers, part_costs
from megatron_m3.config.split_search import SplitSearch


def run(stages: int, interleave: int = 1, **overrides: str) -> Config:
    return replace_fields(get_recipe("tiny"), {
        "model.num_layers": "11", "training.stage": "continual", "parallel.pipeline": str(stages),
        "parallel.interleave": str(interleave),
    } | {name.replace("__", "."): value for name, value in overrides.items()})


def all_splits(config: Config) -> list[tuple[int, ...]]:
    """Every split in which each chunk has a part: the embedding, layers, or the output projection."""
    parts, chunks = config.model.num_layers + 2, config.parallel.pipeline * config.parallel.interleave
    sizes = [[end - start for start, end in pairwise((0, *cuts, parts))]
             for cuts in combinations(range(1, parts), chunks - 1)]
    return [(first - 1, *inner, last - 1) for first, *inner, last in sizes]


def slowest(config: Config, layers: tuple[int, ...]) -> float:
    costs = [sum(cost) for cost in chunk_costs(config, layers)]
    return max(sum(costs[stage :: config.parallel.pipeline]) for stage in range(config.parallel.pipeline))


def step_time(config: Config, layers: tuple[int, ...]) -> float:
    forward, backward = zip(*chunk_costs(config, layers), strict=True)
    return pipeline_time(forward, backward, config.parallel.pipeline, ROUNDS * config.parallel.pipeline).total


@pytest.mark.parametrize("overrides", [
    {}, {"training__stage": "warmup"}, {"model__vocab_size": "8192"}, {"memory__layers": "2,7"},
    {"training__frozen_layers": "6"}, {"parallel__recompute": "true"},
])
@pytest.mark.parametrize("stages", [2, 3, 5])
def test_no_split_has_a_faster_slowest_stage(stages: int, overrides: dict[str, str]) -> None:
    config = run(stages, **overrides)
    frozen = config.training.frozen_layers
    best = min(slowest(config, one) for one in all_splits(config) if not frozen or one[0] > frozen)
    assert slowest(config, stage_layers(config)) == pytest.approx(best)
    assert sum(stage_layers(config)) == 11


@pytest.mark.parametrize("overrides", [{}, {"model__vocab_size": "4096"}, {"memory__layers": "all"}])
def test_no_interleaved_split_makes_a_faster_step(overrides: dict[str, str]) -> None:
    config = run(2, 2, **overrides)
    best = min(step_time(config, one) for one in all_splits(config))
    assert step_time(config, stage_layers(config)) == pytest.approx(best)


@pytest.mark.parametrize(("stages", "interleave"), [(2, 2), (2, 3), (3, 2), (4, 2)])
@pytest.mark.parametrize("overrides", [{}, {"model__vocab_size": "4096"}, {"memory__layers": "0,3,9"}])
def test_shifts_lead_nearly_to_the_best_of_all(
    stages: int, interleave: int, overrides: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are too many splits to look at all; and none is faster than what rules splits out."""
    config = run(stages, interleave, **overrides)
    search = SplitSearch(part_costs(config), stages, ROUNDS * stages, 1)
    cuts_NC = np.array([_cuts(one) for one in all_splits(config)])
    times_N = search.times(cuts_NC)
    assert (search.at_least(cuts_NC) <= times_N * (1 + 1e-12)).all()
    assert times_N[:3] == pytest.approx([step_time(config, one) for one in all_splits(config)[:3]])
    monkeypatch.setattr(split_search, "EVERY", 0)
    monkeypatch.setattr(split, "_plan", split._plan.__wrapped__)
    assert step_time(config, stage_layers(config)) <= 1.02 * times_N.min()


def test_eighty_layers_on_forty_chunks_are_planned_in_no_time() -> None:
    config = run(8, 5, model__num_layers="80", memory__layers=",".join(map(str, range(40))))
    even = step_time(config, even_layers(80, 40))
    started = time.process_time()
    layers = stage_layers(config)
    assert time.process_time() - started < 1
    assert step_time(config, layers) < even


def test_costs_are_those_of_a_step() -> None:
    from megatron_m3.config import step_flops

    config = run(1)
    assert sum(map(sum, part_costs(config))) * config.training.global_batch == pytest.approx(step_flops(config).total)
    once, again = part_costs(config), part_costs(run(1, parallel__recompute="true"))
    assert again[1][1] == once[1][0] + once[1][1]
    assert again[-1] == once[-1], "the output projection is not recomputed"


def test_a_large_vocabulary_leaves_the_last_stage_without_layers() -> None:
    assert stage_layers(run(3, model__vocab_size="16384"))[-1] == 0


def test_frozen_layers_leave_the_first_stage_one_to_train() -> None:
    assert stage_layers(run(5, training__frozen_layers="6"))[0] == 7


def test_given_numbers_are_taken() -> None:
    assert stage_layers(run(3, parallel__split="1, 0,10")) == (1, 0, 10)


@pytest.mark.parametrize(("stages", "interleave", "micro_batches"), [(1, 1, 3), (3, 1, 2), (4, 1, 9), (3, 2, 6)])
def test_time_of_equal_chunks_is_the_known_one(stages: int, interleave: int, micro_batches: int) -> None:
    """Filling and draining the pipe cost stages - 1 passes of one chunk each way."""
    chunks = stages * interleave
    step = pipeline_time([1.0] * chunks, [2.0] * chunks, stages, micro_batches)
    assert step.total == 3 * (micro_batches * interleave + stages - 1)
    assert step.busy == (3.0 * micro_batches * interleave,) * stages
    assert step.bubble == pytest.approx((stages - 1) / (micro_batches * interleave + stages - 1))


def test_a_slow_stage_sets_the_pace() -> None:
    """It waits 1 for its first pass and 3 for the first backward pass; at last the stage before has its 2."""
    assert pipeline_time([1, 3, 2], [2, 6, 4], 3, 10).total == 1 + 3 + 10 * 9 + 2


def test_passes_follow_megatron_cores_schedule() -> None:
    order = stage_passes(0, 2, 2, 4)
    assert [(one.micro_batch, one.chunk) for one in order if not one.backward] == [
        (0, 0), (1, 0), (0, 2), (1, 2), (2, 0), (3, 0), (2, 2), (3, 2)]
    assert [one.backward for one in order] == [False] * 4 + [False, True] * 4 + [True] * 4
    assert [(one.micro_batch, one.chunk) for one in order if one.backward][:3] == [(0, 2), (1, 2), (0, 0)]


def test_earlier_stages_hold_more_micro_batches() -> None:
    assert [most_held([2.0, 2.0, 2.0], stage, 3, 8) for stage in range(3)] == [6.0, 4.0, 2.0]
    assert most_held([2.0, 2.0, 2.0], 0, 3, 1) == 2.0
