"""FLOPs of a training step: against the cost model's formulas, and against counts of real matrix products."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_m3.config import Config, get_recipe, replace_fields, step_flops
from megatron_m3.config.flops import attention_flops, mlp_flops, output_flops, projection_flops, selection_flops
from megatron_m3.evaluation.cost import knowledge_cost


def stage(name: str, config: Config) -> Config:
    return replace_fields(config, {"training.stage": name})


@pytest.mark.parametrize("recipe", ["m3-2b", "m3-0.9b", "demo", "tiny"])
def test_a_warmup_step_is_the_cost_of_writing_its_tokens_into_parameters(recipe: str) -> None:
    config = get_recipe(recipe)
    shares = config.training.global_batch * config.data.sequence_length / config.memory.reference_length
    assert step_flops(config).total == pytest.approx(knowledge_cost(config).write_parameters * shares)


@pytest.mark.parametrize("recipe", ["m3-2b", "m3-0.9b", "demo", "tiny"])
def test_a_continual_step_adds_the_references(recipe: str) -> None:
    """Its forward pass is the cost model's writing, less what the last memory layer's dropped references save."""
    config = stage("continual", get_recipe(recipe))
    model, length = config.model, config.memory.reference_length
    references = config.training.global_batch * config.data.sequence_length // config.memory.chunk_length
    step = step_flops(config)
    output_projection = 2 * length * model.hidden_size * model.num_heads * model.head_size
    saved = attention_flops(model, length**2 / 2) + output_projection
    written = step.references / 3 + step.selection
    assert written / references == pytest.approx(knowledge_cost(config).write_memory - saved)
    assert step.context == step_flops(stage("warmup", config)).total


def test_reading_grows_to_the_window() -> None:
    config = stage("continual", get_recipe("m3-2b"))
    slots = 1 + 2 + 3 + 4 + 28 * 5
    expected = 3 * config.training.global_batch * slots * knowledge_cost(config).read_memory
    assert step_flops(config).reading == pytest.approx(expected)


def test_the_papers_continual_step_costs_less_than_two_warmup_steps() -> None:
    """Twice the tokens more, through half of the layers: about the same again, less the output projection."""
    config = get_recipe("m3-2b")
    ratio = step_flops(stage("continual", config)).total / step_flops(config).total
    assert 1.8 < ratio < 1.9


def test_a_prefix_adds_its_tokens() -> None:
    config = stage("continual", get_recipe("demo"))
    bare, prefixed = step_flops(config), step_flops(config, prefix_length=4)
    assert bare.context < prefixed.context < 1.02 * bare.context
    assert bare.references < prefixed.references


def test_parts_agree_with_torchs_count() -> None:
    """Matrix products written out for one layer of the demo model, counted by torch."""
    model = get_recipe("demo").model
    tokens, inner, outer = 6, model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    hidden = torch.zeros(tokens, model.hidden_size)
    with FlopCounterMode(display=False) as projections:
        hidden @ torch.zeros(model.hidden_size, inner + 2 * outer)
        torch.zeros(tokens, inner) @ torch.zeros(inner, model.hidden_size)
    with FlopCounterMode(display=False) as mlp:
        hidden @ torch.zeros(model.hidden_size, 2 * model.ffn_size)
        torch.zeros(tokens, model.ffn_size) @ torch.zeros(model.ffn_size, model.hidden_size)
    with FlopCounterMode(display=False) as attention:
        query = torch.zeros(model.num_heads, tokens, model.head_size)
        scores = query @ torch.zeros(model.num_heads, model.head_size, 5)
        scores @ torch.zeros(model.num_heads, 5, model.head_size)
    with FlopCounterMode(display=False) as output:
        hidden @ torch.zeros(model.hidden_size, model.padded_vocab_size)
    assert projections.get_total_flops() == projection_flops(model, tokens)
    assert mlp.get_total_flops() == mlp_flops(model, tokens)
    assert attention.get_total_flops() == attention_flops(model, tokens * 5)
    assert output.get_total_flops() == output_flops(model, tokens)
    assert selection_flops(model, 3, tokens) == 3 * attention_flops(model, tokens**2) / 2
