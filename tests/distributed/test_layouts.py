"""A training step is the same, number for number, however the model is laid over processes."""

import json
from pathlib import Path

import pytest

from megatron_m3.config import get_recipe, replace_fields, stage_layers
from tests.distributed.layout_ranks import BASE
from tests.launcher import run_ranks

TENSOR, PIPELINE = {"parallel.tensor": "2"}, {"parallel.pipeline": "2"}
SEQUENCE = TENSOR | {"parallel.sequence": "true"}
INTERLEAVED = PIPELINE | {"parallel.interleave": "2"}
SHARDED = {"parallel.distributed_optimizer": "true"}
RECOMPUTE = {"parallel.recompute": "true"}
WARMUP = {"training.stage": "warmup"}
ALL_LAYERS = {"memory.layers": "1,3", "memory.tokens": "all"}
OTHER = {"model.qkv_bias": "true", "model.qk_norm": "true", "model.rope_scaling": "llama3",
         "model.rope_original_positions": "16", "model.tie_embeddings": "true", "memory.spread": "3",
         "data.references_per_sequence": "3"}
HEADS = {"memory.heads": "0:1;1:0"}
"""Of two tensor-parallel ranks the first has no memory head in layer 0, the second none in layer 1."""
FROZEN = OTHER | {"training.frozen_layers": "1"}
SPARED = OTHER | {"training.reference_gradient_every": "2"}
REUSED = {"memory.layers": "0,2", "training.reuse_memories": "3", "training.reference_gradient_every": "2"}
"""The first of two stages holds the memories of one layer, the second those of the other."""
MEMORY_BYTES = 4 * (2 * 2 * 16 * 4 + 1)
"""Of a memory in one layer."""
FEW = REUSED | {"training.reuse_bytes": str(13 * 2 * MEMORY_BYTES)}
"""Room for 12, so that slots change hands."""
DEEP = {"model.num_layers": "6"}
"""The references pass through the first three layers, so that two stages are planned to have 2 and 4."""

LAYOUTS: dict[int, dict[str, dict[str, str]]] = {
    1: {
        "alone": {},
        "recompute": RECOMPUTE,
        "two micro-batches": {"training.micro_batch": "2"},
        "warmup": WARMUP,
        "memory to the last layer": ALL_LAYERS,
        "tied": {"model.tie_embeddings": "true"},
        "other family": OTHER,
        "frozen": FROZEN,
        "heads": HEADS,
        "deep": DEEP,
        "spared": SPARED,
        "reused": REUSED,
        "few reused": FEW,
    },
    2: {
        "TP2": TENSOR,
        "PP2": PIPELINE,
        "DP2": {},
        "TP2 sequence": SEQUENCE,
        "TP2 sequence recompute": SEQUENCE | RECOMPUTE,
        "DP2 distributed optimizer": SHARDED,
        "PP2 recompute": PIPELINE | RECOMPUTE,
        "PP2 interleaved": INTERLEAVED,
        "warmup PP2 interleaved": WARMUP | INTERLEAVED | RECOMPUTE,
        "warmup TP2 sequence": WARMUP | SEQUENCE,
        "warmup PP2": WARMUP | PIPELINE,
        "memory to the last layer PP2": ALL_LAYERS | PIPELINE,
        "tied PP2": PIPELINE | {"model.tie_embeddings": "true"},
        "other family TP2 sequence": OTHER | SEQUENCE,
        "other family PP2": OTHER | PIPELINE,
        "frozen TP2 sequence recompute": FROZEN | SEQUENCE | RECOMPUTE,
        "frozen PP2": FROZEN | PIPELINE,
        "heads TP2 sequence": HEADS | SEQUENCE,
        "heads PP2": HEADS | PIPELINE,
        "frozen DP2 distributed optimizer": FROZEN | SHARDED,
        "deep PP2 planned": DEEP | PIPELINE,
        "tied PP2 embedding alone": PIPELINE | {"parallel.split": "0,4", "model.tie_embeddings": "true"},
        "spared TP2 sequence recompute": SPARED | SEQUENCE | RECOMPUTE,
        "spared PP2": SPARED | PIPELINE,
        "spared PP2 interleaved": SPARED | INTERLEAVED,
        "reused TP2 sequence recompute": REUSED | SEQUENCE | RECOMPUTE,
        "reused DP2": REUSED,
        "few reused PP2 recompute": FEW | PIPELINE | RECOMPUTE | {"training.reuse_bytes": str(13 * MEMORY_BYTES)},
        "reused PP2 interleaved": REUSED | INTERLEAVED,
        "PP2 interleaved uneven": INTERLEAVED | {"parallel.split": "0,2,1,1"},
    },
    4: {
        "TP2xPP2": TENSOR | PIPELINE,
        "TP2xPP2 sequence": SEQUENCE | PIPELINE,
        "PP2xDP2 distributed optimizer": PIPELINE | SHARDED,
        "spared TP2xPP2 sequence": SPARED | SEQUENCE | PIPELINE,
        "reused TP2xPP2 sequence recompute": REUSED | SEQUENCE | PIPELINE | RECOMPUTE,
        "TP2xPP2 sequence interleaved": SEQUENCE | INTERLEAVED,
        "PP4": {"parallel.pipeline": "4"},
    },
}
CASES = [(ranks, name) for ranks, layouts in LAYOUTS.items() for name in layouts if (ranks, name) != (1, "alone")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    found = {}
    for ranks, layouts in LAYOUTS.items():
        output: Path = tmp_path_factory.mktemp("layouts") / f"{ranks}.json"
        run_ranks("tests.distributed.layout_ranks", ranks, [str(output), json.dumps(layouts)])
        found |= json.loads(output.read_text())
    return found


def baseline(name: str) -> str:
    """The run on one process that a layout must equal."""
    bases = ("warmup", "memory to the last layer", "tied", "other family", "frozen", "heads", "deep", "spared",
             "reused", "few reused")
    return next((base for base in bases if name.startswith(base)), "alone")


def test_planned_splits_are_uneven():
    """Or the layouts that are planned would show nothing."""
    for overrides, layers in ((LAYOUTS[2]["deep PP2 planned"], (2, 4)), (LAYOUTS[4]["PP4"], (1, 1, 2, 0))):
        assert stage_layers(replace_fields(get_recipe("tiny"), BASE | overrides)) == layers


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_steps_equal_those_of_one_process(results, ranks, name):
    found, expected = results[name], results[baseline(name)]
    assert found["initial"] == expected["initial"], "initial weights depend on the layout"
    assert len(found["steps"]) == 4
    for step, true_step in zip(found["steps"], expected["steps"], strict=True):
        assert step == pytest.approx(true_step, abs=1e-5), "loss, gradient norm, tokens"
    assert found["reused"] == expected["reused"]


def test_memories_and_stages_make_a_difference(results):
    first = [results[name]["steps"][0][0] for name in ("alone", "warmup", "memory to the last layer", "heads")]
    assert min(abs(one - other) for one in first for other in first if one != other) > 1e-4
    assert len(set(first)) == 4
    assert results["tied"]["initial"] != results["alone"]["initial"]
    assert results["frozen"]["steps"][0][0] == results["other family"]["steps"][0][0]
    assert results["frozen"]["steps"][1][0] != results["other family"]["steps"][1][0]
    # the second step is the first without a gradient through the references
    assert results["spared"]["steps"][1][0] == results["other family"]["steps"][1][0]
    assert results["spared"]["steps"][2][0] != results["other family"]["steps"][2][0]
    many, few = (sum(results[name]["reused"]) for name in ("reused", "few reused"))
    assert many > few > 0
    assert results["reused"]["steps"][-1][0] != results["few reused"]["steps"][-1][0]
