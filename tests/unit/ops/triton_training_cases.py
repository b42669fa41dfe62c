"""Training with each backend gives the same losses; run by test_triton_attention.py under Triton's interpreter."""

import pytest
import torch

from megatron_m3.config import get_recipe, replace_fields
from tests.tiny_model import joined_world

SHAPE = {"training.stage": "continual", "model.num_layers": "2", "model.num_heads": "2", "model.num_kv_heads": "1",
         "model.hidden_size": "32", "model.init_std": "0.2", "data.sequence_length": "16"}
LENGTHS = [[16, 3], [0, 9]]
STEPS = 2


def losses(backend: str, dtype: str) -> list[float]:
    from megatron_m3.model.gpt import build_model, training_forward

    config = replace_fields(get_recipe("tiny"), SHAPE | {"training.dtype": dtype, "model.attention": backend})
    model, generator = build_model(config)[0], torch.Generator().manual_seed(0)
    shapes = {"context": (2, 16), "labels": (2, 16), "references": (2, 2, 16)}
    batch = {name: torch.randint(0, 512, shape, generator=generator) for name, shape in shapes.items()}
    batch["reference_lengths"], found = torch.tensor(LENGTHS), []
    for _ in range(STEPS):
        loss = training_forward(model, batch, config, torch.tensor([1, 2, 3])).float().mean()
        found.append(loss.item())
        weights = list(model.parameters())
        with torch.no_grad():
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight -= 0.25 * gradient
    return found


@pytest.mark.parametrize(("dtype", "error"), [("fp32", 1e-6), ("bf16", 2**-7)])
def test_losses_agree_to_the_rounding(dtype, error):
    with joined_world():
        truth = losses("reference", dtype)
        assert truth[-1] < truth[0] - 0.5
        for backend in ("torch", "triton"):
            assert losses(backend, dtype) == pytest.approx(truth, rel=error)
