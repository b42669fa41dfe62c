import json
import math

import pytest

from megatron_m3.config import GuardConfig
from megatron_m3.errors import M3Error
from megatron_m3.training.guard import DivergenceError, Guard, GuardState, Verdict

GOOD, SUSPICIOUS, DIVERGED = Verdict.GOOD, Verdict.SUSPICIOUS, Verdict.DIVERGED


def watch(guard, losses, norm=1.0, first=0, batch=4):
    return [guard.observe(loss, norm, (first + index * batch, first + (index + 1) * batch))
            for index, loss in enumerate(losses)]


def make(**fields):
    return Guard(GuardConfig(**({"spike_factor": 2.0, "spike_steps": 3, "min_history": 5} | fields)))


def test_noise_is_good():
    assert set(watch(make(), [3.0, 3.5, 2.5, 3.0, 2.0] * 10)) == {GOOD}


def test_spikes_in_a_row_diverge():
    assert watch(make(), [3.0] * 6 + [7.0] * 3)[6:] == [SUSPICIOUS, SUSPICIOUS, DIVERGED]


def test_one_spike_is_forgiven_and_does_not_move_the_mean():
    guard = make()
    assert watch(guard, [3.0] * 6 + [7.0, 7.0, 3.0])[6:] == [SUSPICIOUS, SUSPICIOUS, GOOD]
    assert guard.state.loss_mean == pytest.approx(3.0)
    assert not guard.pending


def test_spikes_are_not_judged_before_there_is_history():
    assert set(watch(make(), [3.0, 30.0, 3.0, 30.0])) == {GOOD}


def test_without_history_the_first_step_is_good():
    assert watch(make(min_history=0), [3.0, 3.0, 300.0]) == [GOOD, GOOD, SUSPICIOUS]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_diverge_at_once(bad):
    assert watch(make(), [bad]) == [DIVERGED]
    assert make().observe(3.0, bad, (0, 4)) is DIVERGED


def test_spiking_gradient_norm_counts():
    guard = make(norm_spike_factor=10.0, spike_steps=1)
    watch(guard, [3.0] * 6)
    assert guard.observe(3.0, 9.0, (24, 28)) is GOOD
    assert guard.observe(3.0, 100.0, (28, 32)) is DIVERGED


def test_disabled_guard_sees_spikes_as_good_and_refuses_what_no_step_can_mend():
    guard = make(enabled=False)
    assert watch(guard, [3.0] * 6 + [300.0] * 3) == [GOOD] * 9
    with pytest.raises(DivergenceError, match=r"guard\.enabled=false: loss nan.*lower optimizer\.lr"):
        watch(guard, [math.nan])


def test_roll_back_skips_from_the_first_suspicion_and_lowers_the_rate():
    guard = make(lr_factor=0.5)
    watch(guard, [3.0] * 6)
    healthy = guard.state
    watch(guard, [7.0] * 3, first=24)
    assert guard.pending
    assert guard.roll_back(36) == (24, 36)
    guard.restore(healthy)
    assert (guard.lr_factor, guard.state.skipped, guard.pending) == (0.5, [[24, 36]], False)
    assert guard.state.history == healthy.history
    assert guard.next_sequences(20, 4) == (20, 24)
    assert guard.next_sequences(24, 4) == (36, 40)
    assert guard.next_sequences(22, 4) == (36, 40)


def test_skipped_ranges_follow_one_another():
    guard = Guard(GuardConfig(), GuardState(rollbacks=2, skipped=[[8, 12], [12, 20]]))
    assert guard.next_sequences(8, 4) == (20, 24)


def test_state_survives_json():
    guard = make()
    watch(guard, [3.0] * 6 + [math.inf])
    guard.roll_back(28)
    assert GuardState.from_dict(json.loads(json.dumps(guard.state.to_dict()))) == guard.state


def test_restoring_a_later_checkpoint_takes_its_own_returns():
    guard = make()
    guard.restore(GuardState(rollbacks=1, skipped=[[0, 4]]))
    assert guard.lr_factor == 0.5


def test_too_many_returns_are_an_error():
    guard = make(max_rollbacks=1)
    watch(guard, [math.nan])
    guard.roll_back(4)
    watch(guard, [math.nan], first=4)
    with pytest.raises(M3Error, match=r"guard\.max_rollbacks=1"):
        guard.roll_back(8)
