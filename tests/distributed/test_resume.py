"""A run that stops and goes on equals one that never stopped, also when it goes on in another layout."""

import json
import shutil

import pytest

from megatron_m3.manifest import read_manifest
from tests.launcher import run_ranks
from tests.small_data import make_small_data

TENSOR, PIPELINE = {"parallel.tensor": "2"}, {"parallel.pipeline": "2"}
SHARDED = {"parallel.distributed_optimizer": "true"}
BF16 = {"training.dtype": "bf16"}
STEPS, HALF = 6, 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on two processes, each whole or taken up from the middle of another; then on four and on one."""
    folder = tmp_path_factory.mktemp("resume")
    data = make_small_data(tmp_path_factory.mktemp("data"))
    common = {f"data.{name}": str(getattr(data, name)) for name in ("tokens", "tokenizer", "references", "neighbours")}
    common |= {"training.stage": "continual", "training.steps": str(STEPS), "checkpoint.every": str(HALF),
               "training.micro_batch": "1", "logging.tensorboard": "false", "logging.peak_tflops": "1"}

    def run(name, layout):
        return common | {"training.output": str(folder / name)} | layout

    def take_up(name, origin):
        shutil.copytree(folder / origin / f"step_{HALF:07d}", folder / name / f"step_{HALF:07d}")

    def launch(ranks, wanted):
        run_ranks("tests.distributed.resume_ranks", ranks, [json.dumps([run(*one) for one in wanted])])

    launch(2, [("TP2", TENSOR), ("DP2 sharded", SHARDED), ("DP2 bf16", BF16), ("TP2 bf16 sharded", TENSOR | BF16 | SHARDED)])
    for name, origin in (("TP2 again", "TP2"), ("PP2 from TP2", "TP2"), ("DP2 from TP2", "TP2"),
                         ("DP2 sharded again", "DP2 sharded"), ("TP2 from DP2 sharded", "DP2 sharded"),
                         ("DP2 bf16 again", "DP2 bf16"), ("TP2 bf16 sharded again", "TP2 bf16 sharded"),
                         ("TP2xPP2 from TP2", "TP2"), ("TP2xDP2 from DP2 sharded", "DP2 sharded"),
                         ("alone from TP2", "TP2")):
        take_up(name, origin)
    launch(2, [("TP2 again", TENSOR), ("PP2 from TP2", PIPELINE), ("DP2 from TP2", {}), ("DP2 sharded again", SHARDED),
               ("TP2 from DP2 sharded", TENSOR | SHARDED), ("DP2 bf16 again", BF16),
               ("TP2 bf16 sharded again", TENSOR | BF16 | SHARDED)])
    launch(4, [("TP2xPP2 from TP2", TENSOR | PIPELINE), ("TP2xDP2 from DP2 sharded", TENSOR | SHARDED)])
    launch(1, [("alone from TP2", {})])
    return folder


def steps(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: [record[name] for name in ("loss", "grad_norm", "lr", "sequences")] for record in records}


@pytest.mark.parametrize("name", ["TP2", "DP2 sharded", "DP2 bf16", "TP2 bf16 sharded"])
def test_resumed_run_equals_the_whole_run_bit_for_bit(runs, name):
    whole, resumed = steps(runs / name), steps(runs / f"{name} again")
    assert sorted(resumed) == list(range(HALF + 1, STEPS + 1))
    assert resumed == {step: whole[step] for step in resumed}
    last = f"step_{STEPS:07d}"
    hashes = {read_manifest(runs / one / last, "checkpoint", 1).settings["weights_hash"] for one in (name, f"{name} again")}
    assert len(hashes) == 1


@pytest.mark.parametrize(("name", "origin"), [
    ("PP2 from TP2", "TP2"), ("DP2 from TP2", "TP2"), ("TP2 from DP2 sharded", "DP2 sharded"),
    ("TP2xPP2 from TP2", "TP2"), ("TP2xDP2 from DP2 sharded", "DP2 sharded"), ("alone from TP2", "TP2"),
])
def test_run_resumed_in_another_layout_equals_the_whole_run(runs, name, origin):
    whole, resumed = steps(runs / origin), steps(runs / name)
    assert sorted(resumed) == list(range(HALF + 1, STEPS + 1))
    for step, record in resumed.items():
        assert record == pytest.approx(whole[step], abs=1e-5)
