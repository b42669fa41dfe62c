"""Generation on a CUDA device: the same tokens by torch's attention, by Triton's kernels, and as CUDA graphs."""

import pytest
import torch

from tests.unit.inference.triton_generation_cases import engine_of, parts, prompts_of, world  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and pytest -m gpu"),
]


@pytest.mark.parametrize("memory", [True, False])
def test_tokens_do_not_depend_on_how_steps_are_launched(parts, memory):  # noqa: F811
    prompts = prompts_of(parts, [0, 5, 8, 11])
    expected, found = (engine_of(parts, name, memory).generate_tokens(prompts, 40, stop_at_eos=False)[0]
                       for name in ("torch", "triton"))
    repeating = engine_of(parts, "triton", memory, cuda_graphs=True)
    repeated, _ = repeating.generate_tokens(prompts, 40, stop_at_eos=False)
    # other sequences leave early, and a call after others captures anew
    ended, _ = repeating.generate_tokens(prompts, 40)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert [one.tokens for one in repeated] == [one.tokens for one in expected]
    for one, other in zip(ended, expected, strict=True):
        assert one.tokens == other.tokens[: len(one.tokens)]
