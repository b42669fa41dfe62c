"""A run that stops and goes on equals one that never stopped, also when it goes on in another layout."""

import json
import shutil

import pytest

from megatron_m3.manifest import read_manifest
from tests.launcher import run_ranks
from tests.small_data import make_small_data

TENSOR, PIPELINE = {"parallel.tensor": "2"}, {"parallel.pipeline": "2"}
INTERLEAVED = PIPELINE | {"parallel.interleave": "2"}
SHARDED = {"parallel.distributed_optimizer": "true"}
BF16 = {"training.dtype": "bf16"}
FROZEN = {"training.frozen_layers": "1"}
DEEP = {"model.num_layers": "6"}
"""Two stages are planned to have 2 and 4 of these layers."""
STEPS, HALF = 6, 3

WHOLE = {
    "TP2": TENSOR,
    "DP2 sharded": SHARDED,
    "DP2 bf16": BF16,
    "TP2 bf16 sharded": TENSOR | BF16 | SHARDED,
    "PP2 interleaved sharded": INTERLEAVED | SHARDED,
    "TP2 frozen": TENSOR | FROZEN,
    "DP2 frozen sharded": FROZEN | SHARDED,
    "PP2 planned": DEEP | PIPELINE,
}
"""Runs without interruption, on two processes."""

ELSEWHERE = [
    (2, "PP2", PIPELINE, "TP2"),
    (2, "DP2", {}, "TP2"),
    (2, "PP2 interleaved", INTERLEAVED, "TP2"),
    (2, "TP2 sharded", TENSOR | SHARDED, "DP2 sharded"),
    (2, "TP2 sharded from interleaved", TENSOR | SHARDED, "PP2 interleaved sharded"),
    (4, "TP2xPP2", TENSOR | PIPELINE, "TP2"),
    (4, "TP2xDP2 sharded", TENSOR | SHARDED, "DP2 sharded"),
    (1, "alone", {}, "TP2"),
    (1, "alone frozen", FROZEN, "TP2 frozen"),
    (2, "PP2 frozen sharded", PIPELINE | FROZEN | SHARDED, "DP2 frozen sharded"),
    (1, "alone planned", DEEP, "PP2 planned"),
    (2, "PP2 even", DEEP | PIPELINE | {"parallel.split": "3,3"}, "PP2 planned"),
]
"""Processes, name and layout of runs that go on from the middle of another."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with all runs; those that go on have the first half of a whole one behind them."""
    folder = tmp_path_factory.mktemp("resume")
    data = make_small_data(tmp_path_factory.mktemp("data"))
    common = {f"data.{name}": str(getattr(data, name)) for name in ("tokens", "tokenizer", "references", "neighbours")}
    common |= {"training.stage": "continual", "training.steps": str(STEPS), "checkpoint.every": str(HALF),
               "training.micro_batch": "1", "logging.tensorboard": "false", "logging.peak_tflops": "1"}

    def launch(ranks, layouts):
        wanted = [common | {"training.output": str(folder / name)} | layout for name, layout in layouts.items()]
        run_ranks("tests.distributed.resume_ranks", ranks, [json.dumps(wanted)])

    launch(2, WHOLE)
    again = [(2, f"{name} again", layout, name) for name, layout in WHOLE.items()]
    for _, name, _, origin in again + ELSEWHERE:
        shutil.copytree(folder / origin / f"step_{HALF:07d}", folder / name / f"step_{HALF:07d}")
    for ranks in (1, 2, 4):
        launch(ranks, {name: layout for count, name, layout, _ in again + ELSEWHERE if count == ranks})
    return folder


def steps(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: [record[name] for name in ("loss", "grad_norm", "lr", "sequences")] for record in records}


@pytest.mark.parametrize("name", WHOLE)
def test_resumed_run_equals_the_whole_run_bit_for_bit(runs, name):
    whole, resumed = steps(runs / name), steps(runs / f"{name} again")
    assert sorted(resumed) == list(range(HALF + 1, STEPS + 1))
    assert resumed == {step: whole[step] for step in resumed}
    last = [read_manifest(runs / one / f"step_{STEPS:07d}", "checkpoint", 1) for one in (name, f"{name} again")]
    assert last[0].settings["weights_hash"] == last[1].settings["weights_hash"]


@pytest.mark.parametrize(("name", "origin"), [(name, origin) for _, name, _, origin in ELSEWHERE])
def test_run_resumed_in_another_layout_equals_the_whole_run(runs, name, origin):
    whole, resumed = steps(runs / origin), steps(runs / name)
    assert sorted(resumed) == list(range(HALF + 1, STEPS + 1))
    for step, record in resumed.items():
        assert record == pytest.approx(whole[step], abs=1e-5)
