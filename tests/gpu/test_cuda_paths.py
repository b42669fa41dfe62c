"""What only a CUDA device can show: the library kernels behind the torch backend, and a training step over NCCL."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = [
    # batch, prefix, context, chunk length, chunks, slots, window, heads, kv heads, head size
    (2, 3, 256, 64, 4, 8, 5, 8, 2, 64),
    (1, 4, 2048, 64, 32, 8, 5, 40, 8, 80),
    (2, 4, 111, 64, 2, 40, 1, 4, 4, 32),
]


def run(backend, size, tensors, valid, grad):
    _, prefix, _, length, _, _, window, *_ = size
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = backend.memory_attention(*leaves, valid, prefix_length=prefix, chunk_length=length, window=window)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_error_is_at_most_twice_that_of_the_plain_version(size, dtype):
    from megatron_m3.ops.memory_attention import reference, torch_backend

    B, P, S, _, C, M, _, H, G, D = size
    torch.manual_seed(0)
    shapes = [(B, P + S, H, D), (B, P + S, G, D), (B, P + S, G, D), (B, C, M, G, D), (B, C, M, G, D)]
    tensors = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    valid = torch.rand(B, C, M, device="cuda") < 0.7
    grad = torch.randn(shapes[0], device="cuda").to(dtype)
    exact = run(reference, size, [tensor.double() for tensor in tensors], valid, grad.double())
    plain = run(reference, size, tensors, valid, grad)
    for fast, slow, truth in zip(run(torch_backend, size, tensors, valid, grad), plain, exact, strict=True):
        floor = 8 * torch.finfo(dtype).eps * truth.abs().max()
        assert (fast.double() - truth).abs().max() <= 2 * (slow.double() - truth).abs().max() + floor


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_joint_pass_over_nccl_trains(dtype):
    from megatron_m3.config import get_recipe, replace_fields
    from megatron_m3.platform.distributed import parallel_world

    config = replace_fields(get_recipe("tiny"), {"training.stage": "continual", "training.dtype": dtype})
    with parallel_world(config.parallel, seed=1) as platform:
        from megatron_m3.model.gpt import build_model, training_forward

        assert platform.backend == "nccl"
        losses = {}
        for backend in ("torch", "reference"):
            settings = replace_fields(config, {"model.attention": backend})
            model = build_model(settings)[0]
            generator = torch.Generator().manual_seed(0)

            def draw(*shape, generator=generator):
                return torch.randint(0, 512, shape, generator=generator).cuda()

            batch = {"context": draw(2, 32), "labels": draw(2, 32), "references": draw(2, 4, 16),
                     "reference_lengths": torch.tensor([[16, 0, 9, 2], [3, 16, 16, 1]]).cuda()}
            loss = training_forward(model, batch, settings, torch.tensor([1, 2, 3])).float().mean()
            loss.backward()
            assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
            losses[backend] = loss.item()
        assert losses["torch"] == pytest.approx(losses["reference"], rel=2e-2 if dtype == "bf16" else 1e-5)
