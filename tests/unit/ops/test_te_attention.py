"""The te backend: its calls computed in plain torch, and its calls made to the real library where that is installed.

No card is needed, so what cuDNN computes is not shown here; tests/gpu does that.
"""

import functools
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_m3.errors import UnsupportedError
from megatron_m3.ops.memory_attention import get_backend, reference, te_backend
from megatron_m3.ops.memory_attention.joint_softmax import attend_alone, attend_jointly
from tests.unit.ops import plain_fused_attention
from tests.unit.ops.plain_fused_attention import PLAIN
from tests.unit.ops.test_memory_attention import SIZES, assert_close, random_inputs, run, sharpened

KERNEL = te_backend.TeKernel(PLAIN)
JOINT = SimpleNamespace(memory_attention=functools.partial(attend_jointly, KERNEL))
NO_SLOTS = (2, 3, 20, 8, 3, 0, 2, 4, 2, 16)


def sequence_first(tensors):
    """The same numbers, in memory as the model has them."""
    return [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors]


@pytest.mark.parametrize("order", [list, sequence_first])
@pytest.mark.parametrize("size", [*SIZES, NO_SLOTS])
def test_merging_gives_the_joint_softmax(size, order):
    tensors, valid, grad = random_inputs(size, torch.float64)
    fast = run(JOINT, size, order(tensors), valid, order([grad])[0])
    for one, truth in zip(fast, run(reference, size, tensors, valid, grad), strict=True):
        torch.testing.assert_close(one, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_the_plain_version(dtype):
    tensors, valid, grad = random_inputs(SIZES[2], dtype)
    for some in (tensors, sharpened(tensors)):
        assert_close(JOINT, SIZES[2], dtype, some, valid, grad)


def test_all_invalid_is_plain_causal_attention():
    tensors, valid, grad = random_inputs(SIZES[0], torch.float64)
    out, *gradients = run(JOINT, SIZES[0], tensors, torch.zeros_like(valid), grad)
    torch.testing.assert_close(out, reference.causal_attention(*tensors[:3]))
    assert not gradients[3].any()
    assert not gradients[4].any()


def test_a_tensor_in_the_order_of_the_queries_is_not_copied():
    tensors, _, _ = random_inputs(SIZES[0], torch.float32)
    query, key, value = sequence_first(tensors[:3])
    seen = []

    def forward(*arguments, **options):
        seen.extend(arguments[5:8])
        return plain_fused_attention.forward(*arguments, **options)

    te_backend.TeKernel(PLAIN._replace(forward=forward)).forward(query, key, value.contiguous())
    assert [part.data_ptr() == given.data_ptr() for part, given in zip(seen, (query, key, value), strict=True)] == [
        True, True, False]


def test_references_read_the_prefix_before_them():
    generator = torch.Generator().manual_seed(1)
    N, P, T, H, G, D = 3, 2, 9, 4, 2, 8
    shapes = [(N, T, H, D), (N, T, G, D), (N, T, G, D), (N, P, G, D), (N, P, G, D)]
    tensors = [torch.randn(shape, generator=generator).double() for shape in shapes]
    results = []
    for joint in (True, False):
        query, key, value, *prefix = leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        if joint:
            out = attend_alone(KERNEL, query, torch.cat([prefix[0], key], 1), torch.cat([prefix[1], value], 1))
        else:
            out = reference.reference_attention(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for one, truth in zip(*results, strict=True):
        torch.testing.assert_close(one, truth, rtol=1e-9, atol=1e-9)


def on_a_card(dtype=torch.bfloat16):
    """What the backend looks at before it calls anything, of tensors that this machine cannot have."""
    return SimpleNamespace(is_cuda=True, dtype=dtype)


def test_what_it_cannot_do_is_refused_by_name(monkeypatch):
    query = torch.zeros(1, 4, 2, 16)
    with pytest.raises(UnsupportedError, match=r"model\.attention=te: tensors on cpu; .* on CUDA devices alone"):
        get_backend("te").reference_attention(query, query, query, query, query)
    for dtype in (torch.float32, torch.float8_e4m3fn):
        with pytest.raises(UnsupportedError, match=f"bf16 and fp16, not in {dtype}; set training.dtype=bf16"):
            get_backend("te").causal_attention(*[on_a_card(dtype)] * 3)
    with pytest.raises(UnsupportedError, match="different dtypes"):
        get_backend("te").causal_attention(on_a_card(), on_a_card(), on_a_card(torch.float16))


@pytest.mark.parametrize(("found", "reason"), [
    (None, "Transformer Engine is not installed; make gpu-setup installs it"),
    ("2.17.0", "Transformer Engine 2.17.0 is installed, which may differ from 2.20"),
    ("2.20.2", r"Transformer Engine cannot be imported \(.*None in sys.modules\)"),
])
def test_a_library_that_is_missing_or_another_is_refused_by_name(found, reason, monkeypatch):
    def version(name):
        if found is None:
            raise te_backend.importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.cpp_extensions.fused_attn", None)
    with pytest.raises(UnsupportedError, match=f"model.attention=te: {reason}.* use triton or torch"):
        te_backend.library.__wrapped__()


@pytest.fixture
def real():
    """The installed library's functions."""
    try:
        return te_backend.library()
    except UnsupportedError as error:
        pytest.skip(str(error))


def test_the_plain_functions_take_a_part_of_the_real_arguments(real):
    for plain, function in ((PLAIN.forward, real.forward), (PLAIN.backward, real.backward)):
        known, asked = inspect.signature(function).parameters, inspect.signature(plain).parameters
        positional = [name for name, parameter in asked.items() if parameter.kind is not parameter.KEYWORD_ONLY]
        assert list(known)[: len(positional)] == positional
        assert set(asked) <= set(known)
        left = {name for name, parameter in known.items() if parameter.default is parameter.empty} - set(asked)
        assert not left


def test_the_real_functions_take_the_arguments_and_miss_only_a_card(real):
    """pybind11 converts all arguments before the first of them is used, and says so where one does not fit."""
    if torch.cuda.is_available():
        pytest.skip("tests/gpu calls them on the card")
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend

    tensors, _, grad = random_inputs(SIZES[0], torch.bfloat16)
    there = real._replace(find=lambda setting: FusedAttnBackend.F16_arbitrary_seqlen)
    kernel, plain = te_backend.TeKernel(there), KERNEL.forward(*tensors[:3])
    for call in (lambda: kernel.forward(*tensors[:3]), lambda: kernel.backward(grad, *tensors[:3], plain)):
        with pytest.raises(RuntimeError, match=r"(?i)cuda|nvidia"):
            call()
    setting = plain.rest[0]
    with pytest.raises(RuntimeError, match=r"(?i)cuda|nvidia|cudnn"):
        te_backend.find_kernel.__wrapped__(setting)
    asked = te_backend.question(setting)
    assert (asked.batch_size, asked.num_attn_heads, asked.num_gqa_groups, asked.head_dim_v) == (2, 4, 2, 16)
    assert (asked.max_seqlen_q, asked.max_seqlen_kv, asked.attn_scale) == (35, 35, 0.25)
