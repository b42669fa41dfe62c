"""Divergence on several processes: all return together, and too much of it is one line and status 2."""

import json

import pytest

from tests.launcher import run_ranks
from tests.small_data import make_small_data

WILD = {"optimizer.lr": "30", "schedule.style": "constant", "schedule.warmup_fraction": "0", "training.steps": "6",
        "checkpoint.every": "1", "guard.min_history": "1", "guard.spike_steps": "2", "training.micro_batch": "1",
        "training.stage": "continual", "logging.tensorboard": "false"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_small_data(tmp_path_factory.mktemp("data"))


def pretrain(data, output, expect, **overrides):
    options = WILD | {f"data.{name}": str(getattr(data, name))
                      for name in ("tokens", "tokenizer", "references", "neighbours")}
    options |= {name.replace("__", "."): value for name, value in overrides.items()} | {"training.output": str(output)}
    arguments = ["--recipe", "tiny", *(word for name, value in options.items() for word in (f"--{name}", value))]
    return run_ranks("launch.pretrain", 2, arguments, expect=expect)


def test_sequence_parallel_and_distributed_optimizer_return_together(data, tmp_path):
    done = pretrain(data, tmp_path / "run", 0, guard__lr_factor="0.001", parallel__tensor="2",
                    parallel__sequence="true", parallel__distributed_optimizer="true")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record.get("step", "event") for record in records] == ["event", 1, 2, 3, 4, 5, 6]
    assert done.stderr.count("diverged") == 1
    assert records[-1]["loss"] < 8
    assert "trained 6 steps" in done.stdout


def test_endless_divergence_is_one_line(data, tmp_path):
    done = pretrain(data, tmp_path / "run", 1, guard__lr_factor="1", guard__max_rollbacks="1", parallel__pipeline="2")
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error: guard.max_rollbacks=1: training diverged once more")
    assert "exitcode  : 2" in done.stderr
    assert "[rank" not in done.stderr, "a traceback of our own"
