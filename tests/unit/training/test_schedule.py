import itertools
import math

import pytest

from megatron_m3.config import MemoryConfig, ScheduleConfig
from megatron_m3.training.schedule import kept_tokens, learning_rate, rate_factor


def rates(steps, **fields):
    return [rate_factor(step, steps, ScheduleConfig(**fields)) for step in range(steps)]


def test_wsd_rises_stays_and_falls_over_the_last_tenth():
    found = rates(100, style="wsd", warmup_fraction=0.05, decay_fraction=0.1, min_ratio=0.01)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(found[5:90]) == {1.0}
    falls = [before - after for before, after in itertools.pairwise(found[89:])]
    assert falls == pytest.approx([0.099] * 10)
    assert found[-1] == pytest.approx(0.01)


def test_cosine_is_half_way_down_in_the_middle():
    found = rates(110, style="cosine", warmup_fraction=10 / 110, min_ratio=0.1)
    assert found[9] == 1.0
    assert found[10 + 49] == pytest.approx(0.1 + 0.9 / 2)
    assert found[-1] == pytest.approx(0.1)
    assert found[10 + 24] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_constant_stays():
    assert rates(10, style="constant", warmup_fraction=0.2) == [0.5] + [1.0] * 9


@pytest.mark.parametrize("style", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 17])
def test_few_steps_stay_within_bounds(style, steps):
    for fields in ({}, {"warmup_fraction": 0.0}, {"warmup_fraction": 1.0}, {"decay_fraction": 1.0}):
        assert all(0 < rate <= 1 for rate in rates(steps, style=style, **fields))


def test_a_fall_that_would_begin_in_the_rise_begins_after_it():
    found = rates(10, style="wsd", warmup_fraction=0.5, decay_fraction=0.8, min_ratio=0.01)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[5:] == pytest.approx([1 - 0.99 * fallen / 5 for fallen in range(1, 6)])


def test_rate_is_a_share_of_the_highest():
    assert learning_rate(50, 100, 4e-4, ScheduleConfig()) == 4e-4


def test_kept_tokens_fall_by_equal_factors_and_stay():
    memory = MemoryConfig(tokens="8", curriculum=0.5)
    kept = [kept_tokens(step, 40, memory) for step in range(40)]
    assert kept[0] == 128
    assert kept[5] == 64
    assert kept[10] == 32
    assert kept[15] == 16
    assert kept[20:] == [8] * 20
    assert kept == sorted(kept, reverse=True)
    assert kept_tokens(0, 40, MemoryConfig(tokens="8")) == 8
