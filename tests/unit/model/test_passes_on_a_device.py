"""Passes on a device that is not the CPU: they mix no devices, and between two of them nothing waits for the device.

It is torch's meta device, whose tensors hold no numbers, so reading one raises, as mixing it with the CPU does; torch's
attention takes the way there that it takes on CUDA. What a CUDA kernel computes is not shown here; tests/gpu does that.
"""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_m3.config import get_recipe, replace_fields
from megatron_m3.ops.select_tokens import reference
from tests.tiny_model import joined_world

META = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Operations that two devices take part in raise: for copies between them the host would wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        devices = {leaf.device for leaf in tree_leaves((args, out)) if isinstance(leaf, torch.Tensor)}
        assert len(devices) < 2, f"{function} between devices"
        return out


@pytest.fixture(scope="module", autouse=True)
def world():
    with joined_world():
        yield


@pytest.fixture(autouse=True)
def scores(monkeypatch):
    monkeypatch.setitem(reference.SCORES_AT_ONCE, "meta", reference.SCORES_AT_ONCE["cuda"])


def model_there(**changes):
    from megatron_m3.model.gpt import build_model

    config = replace_fields(get_recipe("tiny"), {"model.attention": "torch", "training.dtype": "bf16"} | changes)
    return config, build_model(config)[0].to(META)


@pytest.mark.parametrize(("gradient", "changes"), itertools.product([True, False], [
    {}, {"memory.spread": "2", "memory.selection": "value", "memory.heads": "0:0;1:1"},
]))
def test_a_training_pass(gradient, changes):
    from megatron_m3.model.gpt import training_forward

    config, model = model_there(**{"training.stage": "continual"} | changes)
    shapes = {"context": (2, 32), "labels": (2, 32), "references": (2, 4, 16), "reference_lengths": (2, 4),
              "chunk_references": (2, 4)}
    batch = {name: torch.zeros(shape, dtype=torch.int64, device=META) for name, shape in shapes.items()}
    prefix = torch.zeros(3, dtype=torch.int64, device=META)

    def step():
        training_forward(model, batch, config, prefix, reference_gradient=gradient).float().mean().backward()

    step()
    with OneDevice():
        step()
    assert all(weight.grad.device == META for weight in model.parameters())


@pytest.mark.parametrize("lengths", [[5, 5], [5, 3]])
def test_a_step_of_generation(lengths):
    from megatron_m3.inference.cache import CachePlan, CacheShape
    from megatron_m3.inference.decoder import Decoder
    from megatron_m3.model.rope import Rope

    config, model = model_there()
    decoder = Decoder(model.requires_grad_(False), config)
    cache = CachePlan(CacheShape(
        batch=2, num_layers=4, num_kv_heads=2, head_size=16, prefix_length=3, context_start=19, max_context=20,
        memory_layers=(0, 1), memory_heads={1: torch.tensor([True, False])}, num_slots=8, dtype=torch.bfloat16,
        device=META), Rope.of(config.model))
    cache.begin(lengths)
    tokens = torch.zeros(2, 1, dtype=torch.int64, device=META)

    @torch.inference_mode()
    def step():
        cache.step()
        return decoder(tokens, cache)

    step()
    with OneDevice():
        assert step().shape == (2, config.model.vocab_size)
