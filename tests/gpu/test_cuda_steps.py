"""Generation on a CUDA device: the same tokens by torch's attention, by Triton's kernels, and as CUDA graphs."""

import pytest
import torch

from tests.unit.inference.triton_generation_cases import engine_of, joined_tokens, parts, prompts_of, world  # noqa: F401

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
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert [one.tokens for one in repeated] == [one.tokens for one in expected]
    # each of these batches lives long enough for its own graph
    counts = [40, 30, 20, 10]
    assert joined_tokens(repeating, prompts, counts) == [
        one.tokens[:count] for one, count in zip(expected, counts, strict=True)]


def test_a_step_that_cannot_be_captured_leaves_the_stream_as_it_was():
    from megatron_m3.inference.steps import capture

    before, number = torch.cuda.current_stream(), torch.ones(1, device="cuda")
    # a capture must not wait for the device
    with pytest.raises(RuntimeError):
        capture(lambda: number * number.item())
    assert torch.cuda.current_stream() == before
    replay = capture(lambda: number + 1)
    assert replay().item() == 2
