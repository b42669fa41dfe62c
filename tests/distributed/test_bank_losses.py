"""Bank builds that lose ranks, or wait for slow ones: nothing finished is lost, and the bytes are the same."""

import contextlib
import random
import signal

import pytest

from megatron_m3.manifest.process import place
from tests.bank_jobs import JOB, NUM_SHARDS, claimed, digest, finished, ranks_of, started, wait_until

RANKS = 2
OPEN = 6
"""Most shards that a rank has open, as each is one group here: one with the model, three before it, two behind it."""


def owner(claim):
    """Whose a claim is; nobody's where its shard was written just now."""
    with contextlib.suppress(FileNotFoundError):
        return claim.read_text()
    return ""


@pytest.mark.parametrize("seed", [0])
def test_ranks_killed_at_random_until_the_bank_is_complete(inputs, built, tmp_path, seed):
    generator, output, kills = random.Random(seed), tmp_path / "bank", 0
    while not (output / "manifest.json").exists():
        assert kills < 10
        before = finished(output)
        goal = len(before) + generator.randrange(1, 2 * NUM_SHARDS // 3)
        with started(inputs, output, RANKS, *JOB) as job:
            wait_until(lambda: len(finished(output)) >= goal or job.poll() is not None)  # noqa: B023
            ranks = ranks_of(job)
            if ranks:
                generator.choice(ranks).send_signal(signal.SIGKILL)
                kills += 1
            status = job.wait(60)
        after = finished(output)
        assert {name: after[name] for name in before} == before
        assert (output / "manifest.json").exists() or status != 0
        assert len(claimed(output) - set(after)) <= RANKS * OPEN
    assert kills >= 2
    with started(inputs, output, RANKS, *JOB) as job:
        assert job.wait(120) == 0
    assert finished(output) == after
    assert digest(output) == digest(built)


def test_a_stopped_rank_holds_only_its_open_shards(inputs, built, tmp_path):
    output = tmp_path / "bank"
    with started(inputs, output, RANKS, *JOB) as job:
        wait_until(lambda: len(finished(output)) >= 10)
        slow = ranks_of(job)[0]
        slow.send_signal(signal.SIGSTOP)
        mine = f"{place()}-{slow.pid}-"
        held = {path.stem for path in output.glob(".claims/shard_*.claim") if owner(path).startswith(mine)}
        assert len(finished(output)) < NUM_SHARDS - OPEN, "faster than the test"
        wait_until(lambda: len(set(finished(output)) | held) == NUM_SHARDS)
        assert len(held) <= OPEN
        assert not (output / "manifest.json").exists()
        slow.send_signal(signal.SIGCONT)
        assert job.wait(120) == 0
    assert digest(output) == digest(built)


def test_jobs_that_know_nothing_of_each_other_share_a_bank_and_outlive_one_another(inputs, built, tmp_path):
    output = tmp_path / "bank"
    with started(inputs, output, 0, *JOB) as lost, started(inputs, output, 0, *JOB) as other:
        wait_until(lambda: len(list(output.glob(".claims/*.alive"))) == 2 and len(finished(output)) >= 10)
        lost.send_signal(signal.SIGKILL)
        lost.wait(60)
        before = finished(output)
        assert len(before) < NUM_SHARDS, "faster than the test"
        assert other.wait(120) == 0
    after = finished(output)
    assert {name: after[name] for name in before} == before
    assert digest(output) == digest(built)
