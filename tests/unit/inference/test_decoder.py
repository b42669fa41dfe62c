"""The forward pass of generation is the model's own, to rounding, whatever its layers have."""

import pytest
import torch

from tests.tiny_model import tiny_model

SHAPES = {
    "plain": {},
    "all": {"model__qkv_bias": "true", "model__qk_norm": "true", "model__tie_embeddings": "true",
            "model__vocab_multiple": "384"},
}


@pytest.fixture(scope="module", params=SHAPES)
def loaded(request, tmp_path_factory):
    """A model in which norms and biases differ from what they begin with."""
    loaded = tiny_model(tmp_path_factory.mktemp("decoder"), **SHAPES[request.param])
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_logits_are_those_of_the_modules(loaded, dtype):
    from megatron_m3.inference.decoder import Decoder
    from megatron_m3.inference.reading import ReadingPlan
    from megatron_m3.model.gpt import logits
    from megatron_m3.model.rope import Rope

    model, shape = loaded.model.to(dtype), loaded.config.model
    model.config.params_dtype, model.config.bf16 = dtype, dtype == torch.bfloat16
    decoder, rope = Decoder(model, loaded.config), Rope.of(shape)
    tokens_BS = torch.randint(shape.vocab_size, (3, 21), generator=torch.Generator().manual_seed(1))
    columns_B = torch.tensor([20, 0, 7])
    positions_T = torch.arange(21)
    whole = logits(model, tokens_BS, ReadingPlan(rope, positions_T), shape.vocab_size)
    found = decoder(tokens_BS, ReadingPlan(rope, positions_T), columns_B)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(found, whole[torch.arange(3), columns_B], **close)
    first = decoder(tokens_BS[:, :1], ReadingPlan(rope, positions_T[:1]))
    torch.testing.assert_close(first, whole[:, 0], **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.inference_mode()
def test_frozen_linear_is_linear_for_any_number_of_rows(dtype):
    from megatron_m3.inference.linear import frozen_linear

    generator = torch.Generator().manual_seed(1)
    weight, bias = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((70, 33), (70,)))
    for count in (1, 3, 8, 65):
        rows = torch.randn(count, 66, generator=generator, dtype=torch.float64)[:, ::2]
        for added in (None, bias):
            given = [None if one is None else one.to(dtype) for one in (rows, weight, added)]
            exact = torch.nn.functional.linear(*(None if one is None else one.double() for one in given))
            found = frozen_linear(*given[1:])(given[0])
            assert found.dtype == dtype
            error = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
            torch.testing.assert_close(found.double(), exact, rtol=error, atol=10 * error)
