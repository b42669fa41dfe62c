"""What only a CUDA device can show: the backends on their kernels, and a training step over NCCL."""

import itertools

import pytest
import torch

from tests.unit.ops.test_memory_attention import assert_close, assert_error_at_most_twice, run, sharpened

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
TE_SIZES = [*SIZES, *TRITON_SIZES[:3], (2, 2, 65, 16, 4, 5, 5, 6, 3, 64), (1, 0, 63, 64, 1, 8, 1, 4, 1, 128)]
HALF = [torch.bfloat16, torch.float16]
CASES = [
    *itertools.product(["torch", "triton"], SIZES, [*HALF, torch.float32]),
    *itertools.product(["triton"], TRITON_SIZES, [*HALF, torch.float32]),
    *itertools.product(["te"], TE_SIZES, HALF),
]


def why_not_te():
    """Why Transformer Engine cannot be had; None where it can."""
    from megatron_m3.errors import UnsupportedError
    from megatron_m3.ops.memory_attention import te_backend

    try:
        te_backend.library()
    except UnsupportedError as error:
        return str(error)
    return None


def backend_named(name):
    """The backend; a test of te is skipped, with the reason, where there is none."""
    from megatron_m3.ops.memory_attention import get_backend

    if name == "te" and (reason := why_not_te()):
        pytest.skip(reason)
    return get_backend(name)


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


@pytest.mark.parametrize(("backend", "size", "dtype"), CASES)
def test_error_is_at_most_twice_that_of_the_plain_version(backend, size, dtype, poisoned_outputs):
    assert_close(backend_named(backend), size, dtype, *inputs(size, dtype))


@pytest.mark.parametrize(("backend", "dtype"), itertools.product(["torch", "triton", "te"], HALF))
def test_large_scores_keep_their_digits(backend, dtype):
    tensors, valid, grad = inputs(SIZES[0], dtype)
    assert_close(backend_named(backend), SIZES[0], dtype, sharpened(tensors), valid, grad)


@pytest.mark.parametrize("backend", ["torch", "te"])
@pytest.mark.parametrize("size", [SIZES[0], SIZES[1]])
def test_tensors_may_lie_with_the_sequence_first(backend, size):
    """As the model has them; te then takes another layout of cuDNN's."""
    tensors, valid, grad = inputs(size, torch.bfloat16)
    *tensors, grad = (tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (*tensors, grad))
    assert_close(backend_named(backend), size, torch.bfloat16, tensors, valid, grad)


@pytest.mark.parametrize("backend", ["torch", "triton", "te"])
def test_memories_that_are_all_empty_change_nothing(backend):
    size = SIZES[0]
    tensors, valid, grad = inputs(size, torch.bfloat16)
    empty = torch.zeros_like(valid)
    assert_close(backend_named(backend), size, torch.bfloat16, tensors, empty, grad)
    gradients = run(backend_named(backend), size, tensors, empty, grad)[4:]
    assert not any(gradient.any() for gradient in gradients)


def test_te_refuses_heads_that_cudnn_does_not_take():
    from megatron_m3.errors import UnsupportedError

    backend, size = backend_named("te"), (1, 0, 16, 8, 2, 2, 1, 2, 1, 20)
    tensors, valid, _ = inputs(size, torch.bfloat16)
    with pytest.raises(UnsupportedError, match=r"model\.attention=te: no fused attention for 2/1 heads of 20"):
        backend.memory_attention(*tensors, valid, prefix_length=0, chunk_length=8, window=1)


@pytest.mark.parametrize("size", [SIZES[1], (4, *SIZES[1][1:])])
def test_triton_gives_the_same_bits_every_time(size):
    from megatron_m3.ops.memory_attention import triton_backend

    first, *others = (run(triton_backend, size, *inputs(size, torch.bfloat16)) for _ in range(4))
    assert all(torch.equal(one, other) for again in others for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize(("backend", "dtype"), [
    *itertools.product(["torch", "triton"], [torch.bfloat16, torch.float32]), *itertools.product(["te"], HALF)])
def test_reference_attention_and_its_gradients(backend, dtype):
    from megatron_m3.ops.memory_attention import reference

    torch.manual_seed(0)
    N, P, T, H, G, D = 6, 4, 128, 10, 2, 80
    shapes = [(N, T, H, D), (N, T, G, D), (N, T, G, D), (N, P, G, D), (N, P, G, D)]
    tensors, grad = [torch.randn(shape, device="cuda") for shape in shapes], torch.randn(N, T, H, D, device="cuda")
    results = []
    for function, kind in ((backend_named(backend), dtype), (reference, dtype), (reference, torch.float64)):
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
        losses, backends = {}, ["torch", "triton", "reference"]
        if dtype == "bf16" and not why_not_te():
            backends.append("te")
        for backend in backends:
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
        for backend in set(backends) - {"reference"}:
            assert losses[backend] == pytest.approx(losses["reference"], rel=2e-2 if dtype == "bf16" else 1e-5)


@pytest.mark.parametrize(("impl", "fused", "dtype"), [
    ("local", False, "fp32"), ("local", False, "bf16"), ("transformer_engine", True, "fp32"),
    ("transformer_engine", True, "bf16"),
])
def test_layers_of_other_modules_give_the_same_step(impl, fused, dtype):
    from megatron_m3.config import get_recipe, replace_fields
    from megatron_m3.platform.distributed import parallel_world
    from tests.benchmarks.bench_training import PREFIX, batches

    if impl == "transformer_engine" and (reason := why_not_te()):
        pytest.skip(reason)
    config = replace_fields(get_recipe("tiny"), {"training.stage": "continual", "training.dtype": dtype})
    with parallel_world(config.parallel, seed=1):
        from megatron_m3.model.gpt import build_model, training_forward

        batch = {name: part.cuda() for name, part in next(batches(config)).items()}
        results = []
        for kind, fuse in (("local", True), (impl, fused)):
            settings = replace_fields(config, {"training.transformer_impl": kind})
            [model] = build_model(settings)
            assert model.config.bias_activation_fusion
            model.config.bias_activation_fusion = fuse
            loss = training_forward(model, batch, settings, torch.tensor(PREFIX)).float().mean()
            loss.backward()
            norm = sum(weight.grad.float().square().sum() for weight in model.parameters()).sqrt()
            results.append([loss.item(), norm.item()])
    assert results[1] == pytest.approx(results[0], rel=2e-2 if dtype == "bf16" else 1e-3)
