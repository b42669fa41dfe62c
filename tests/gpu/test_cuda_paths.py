"""What only a CUDA device can show: the torch and triton backends on their kernels, and a training step over NCCL."""

import itertools

import pytest
import torch

from tests.unit.ops.test_memory_attention import assert_close, assert_error_at_most_twice, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and pytest -m gpu"),
]

SIZES = [
    # batch, prefix, context, chunk length, chunks, slots, window, heads, kv heads, head size
    (2, 3, 256, 64, 4, 8, 5, 8, 2, 64),
    (1, 4, 2048, 64, 32, 8, 5, 40, 8, 80),
    (2, 4, 111, 64, 2, 40, 1, 4, 4, 32),
    (1, 0, 700, 64, 11, 8, 5, 8, 2, 128),
]
TRITON_SIZES = [
    (1, 1, 1, 64, 1, 1, 1, 2, 1, 80),
    (2, 0, 63, 16, 4, 5, 5, 6, 3, 40),
    (1, 3, 65, 64, 1, 0, 1, 4, 2, 96),
    (1, 5, 300, 64, 4, 128, 2, 4, 1, 192),
    (1, 2, 257, 32, 8, 16, 3, 2, 2, 256),
]
CASES = [*itertools.product(["torch", "triton"], SIZES), *itertools.product(["triton"], TRITON_SIZES)]


def inputs(size, dtype):
    B, P, S, _, C, M, _, H, G, D = size
    torch.manual_seed(0)
    shapes = [(B, P + S, H, D), (B, P + S, G, D), (B, P + S, G, D), (B, C, M, G, D), (B, C, M, G, D)]
    tensors = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    return tensors, torch.rand(B, C, M, device="cuda") < 0.7, torch.randn(shapes[0], device="cuda").to(dtype)


@pytest.fixture
def poisoned_outputs():
    """Whatever memory an operation is given holds NaN, so what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(2, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("backend", "size"), CASES)
def test_error_is_at_most_twice_that_of_the_plain_version(backend, size, dtype, poisoned_outputs):
    from megatron_m3.ops.memory_attention import get_backend

    assert_close(get_backend(backend), size, dtype, *inputs(size, dtype))


@pytest.mark.parametrize("size", [SIZES[1], (4, *SIZES[1][1:])])
def test_triton_gives_the_same_bits_every_time(size):
    from megatron_m3.ops.memory_attention import triton_backend

    first, *others = (run(triton_backend, size, *inputs(size, torch.bfloat16)) for _ in range(4))
    assert all(torch.equal(one, other) for again in others for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_reference_attention_and_its_gradients(backend, dtype):
    from megatron_m3.ops.memory_attention import get_backend, reference

    torch.manual_seed(0)
    N, P, T, H, G, D = 6, 4, 128, 10, 2, 80
    shapes = [(N, T, H, D), (N, T, G, D), (N, T, G, D), (N, P, G, D), (N, P, G, D)]
    tensors, grad = [torch.randn(shape, device="cuda") for shape in shapes], torch.randn(N, T, H, D, device="cuda")
    results = []
    for function, kind in ((get_backend(backend), dtype), (reference, dtype), (reference, torch.float64)):
        leaves = [tensor.to(dtype).to(kind).requires_grad_() for tensor in tensors]
        out = function.reference_attention(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(dtype).to(kind))])
    assert_error_at_most_twice(*results, dtype)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_joint_pass_over_nccl_trains(dtype):
    from megatron_m3.config import get_recipe, replace_fields
    from megatron_m3.platform.distributed import parallel_world

    config = replace_fields(get_recipe("tiny"), {"training.stage": "continual", "training.dtype": dtype})
    with parallel_world(config.parallel, seed=1) as platform:
        from megatron_m3.model.gpt import build_model, training_forward

        assert platform.backend == "nccl"
        losses = {}
        for backend in ("torch", "triton", "reference"):
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
        for backend in ("torch", "triton"):
            assert losses[backend] == pytest.approx(losses["reference"], rel=2e-2 if dtype == "bf16" else 1e-5)
