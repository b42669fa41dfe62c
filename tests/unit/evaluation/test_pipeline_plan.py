"""`m3 plan`: its bytes against a real model's, its shares against the cost model, and what it advises."""

import json
from dataclasses import replace

import pytest
import torch

from launch.plan import main
from megatron_m3.config import Config, get_recipe, replace_fields, step_flops
from megatron_m3.errors import ConfigError
from megatron_m3.evaluation.pipeline_plan import pipeline_plan
from tests.tiny_model import joined_world

EVEN = ["--recipe", "m3-2b", "--training.stage", "continual", "--parallel.pipeline", "4", "--processes", "64",
        "--parallel.split", "11,11,11,11"]


def changed(**overrides: str) -> Config:
    fields = {name.replace("__", "."): text for name, text in overrides.items()}
    return replace_fields(get_recipe("demo"), {
        "model.num_layers": "3", "training.stage": "continual", "training.global_batch": "1",
        "training.micro_batch": "1",
    } | fields)


def saved_bytes(config: Config) -> tuple[int, int]:
    """Bytes of a real model's weights, and of what one forward pass keeps for the backward pass."""
    from megatron_m3.model.gpt import build_model, training_forward
    from tests.benchmarks.bench_training import PREFIX, batches

    [model] = build_model(config)
    model.config.bias_activation_fusion = True  # as on CUDA
    weights = {weight.untyped_storage().data_ptr(): weight.nbytes for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        training_forward(model, next(batches(config)), config, torch.tensor(PREFIX))
    return sum(weights.values()), sum(tensor.untyped_storage().nbytes()
                                      for place, tensor in kept.items() if place not in weights)


@pytest.mark.parametrize("overrides", [
    {"training__stage": "warmup"}, {}, {"memory__layers": "0,2", "model__tie_embeddings": "false"},
    {"model__num_heads": "12", "model__qkv_bias": "true"},
])
def test_bytes_are_those_of_a_real_model(overrides: dict[str, str]) -> None:
    config = changed(**overrides)
    [stage] = pipeline_plan(config, 1).stages
    with joined_world():
        weights, kept = saved_bytes(config)
        _, wider = saved_bytes(replace(config, model=replace(config.model, ffn_size=1024)))
    assert stage.weight_bytes == stage.gradient_bytes == stage.optimizer_bytes // 2 == pytest.approx(weights, rel=2e-3)
    # the norms on the CPU are made of parts that keep more
    assert 0.85 * kept < stage.activation_bytes < kept
    [wide] = pipeline_plan(replace(config, model=replace(config.model, ffn_size=1024)), 1).stages
    assert wide.activation_bytes - stage.activation_bytes == pytest.approx(wider - kept, rel=0.02)


def test_stages_share_a_step() -> None:
    config = replace_fields(get_recipe("m3-2b"), {"parallel.pipeline": "4", "training.stage": "continual",
                                                  "parallel.recompute": "false", "model.vocab_size": "32000"})
    plan, whole = pipeline_plan(config, 64), pipeline_plan(replace_fields(config, {"parallel.pipeline": "1"}), 16)
    sequences = config.training.global_batch
    assert sum(stage.flops for stage in plan.stages) * sequences == pytest.approx(step_flops(config).total)
    assert sum(stage.flops_share for stage in plan.stages) == pytest.approx(1)
    assert sum(stage.memory_layers for stage in plan.stages) == 22
    assert [stage.layers for stage in plan.stages] == [((0, 7),), ((7, 8),), ((15, 10),), ((25, 19),)]
    for name in ("weight_bytes", "gradient_bytes", "optimizer_bytes"):
        assert sum(getattr(stage, name) for stage in plan.stages) == pytest.approx(getattr(whole.stages[0], name))
    assert plan.stages[0].waits > min(stage.waits for stage in plan.stages) > 0
    assert plan.time_to_even < 0.75


def test_recomputation_holds_less_and_parallelism_shares() -> None:
    base = {"parallel.pipeline": "2", "training.stage": "continual"}
    full, tensor = ({"parallel.recompute": "false"}, {"parallel.tensor": "4"})
    plans = [pipeline_plan(replace_fields(get_recipe("m3-2b"), base | more), 32).stages[0]
             for more in ({}, full, tensor)]
    assert plans[0].activation_bytes < plans[1].activation_bytes / 5
    assert plans[2].weight_bytes == pytest.approx(2 * plans[0].weight_bytes, rel=1e-3)
    assert plans[2].optimizer_bytes == pytest.approx(plans[0].optimizer_bytes, rel=1e-3), "4 times the data processes"


def test_held_memories_are_those_of_all_tokens_where_a_curriculum_begins_with_them() -> None:
    few = changed(training__reuse_memories="2", training__global_batch="3")
    many = replace(few, memory=replace(few.memory, curriculum=0.5))
    held, most = (pipeline_plan(config, 1).stages[0].held_bytes for config in (few, many))
    slots, memory = 2 * 3 * few.num_references + 1, few.memory
    token = 2 * few.model.num_kv_heads * few.model.head_size * 4 + 1
    assert held == slots * len(few.memory_layers) * memory.num_kept_tokens * token
    assert most == slots * len(few.memory_layers) * memory.reference_length * token


def test_command_prints_the_plan_and_what_to_change(capsys) -> None:
    main(EVEN)
    text = capsys.readouterr().out
    assert "4 pipeline stages of 11,11,11,11 layers" in text
    assert "parallel.split=auto plans 7,8,10,19, which shortens a step by 27." in text
    main(["--recipe", "m3-2b", "--parallel.pipeline", "4", "--training.global-batch", "8"])
    assert "Twice the micro-batches (training.global_batch=16)" in capsys.readouterr().out
    main(["--recipe", "smollm2-135m", "--parallel.pipeline", "16", "--training.frozen-layers", "0"])
    assert "The slowest stage is the output projection alone" in capsys.readouterr().out


def test_command_prints_json(capsys) -> None:
    main([*EVEN[:-2], "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["split"] == [7, 8, 10, 19]
    assert plan["config"]["parallel"]["pipeline"] == 4
    assert set(plan["stages"][0]) >= {"layers", "memory_layers", "flops_share", "activation_bytes", "waits"}


@pytest.mark.parametrize(("more", "message"), [
    (["--processes", "96"], r"training\.global_batch=2048: must be a multiple"),
    (["--processes", "33"], "needs a multiple of 32 processes"),
    (["--processes", "-1"], "processes=-1: must be at least 0"),
    (["--parallel.split", "11,11,11,12"], r"parallel\.split=11,11,11,12: adds up to 45"),
])
def test_what_cannot_be_is_one_line(more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main([*EVEN, *more])


def test_a_split_that_cannot_be_planned_is_shown() -> None:
    """One layer for four stages: auto refuses that, numbers may say it."""
    config = changed(model__num_layers="1", memory__layers="0", parallel__pipeline="4", parallel__split="0,0,1,0")
    plan = pipeline_plan(config, 4)
    assert [stage.flops > 0 for stage in plan.stages] == [False, False, True, True]
    assert not any("auto" in one or "interleave" in one for one in plan.advice)
