"""The triton backend against the reference, run by test_triton_attention.py in a process of its own.

Triton's interpreter is chosen when Triton is first imported. Tiles are small here, so that short sequences have many.
"""

import itertools

import pytest
import torch

from megatron_m3.errors import UnsupportedError
from megatron_m3.ops.memory_attention import reference, triton_backend, triton_tiles
from tests.unit.ops.test_memory_attention import assert_close, random_inputs, run

SMALL = {"forward": triton_tiles.Tile(32, 16, 16, 4, 1), "query": triton_tiles.Tile(16, 32, 16, 4, 1),
         "key": triton_tiles.Tile(16, 32, 16, 4, 1)}
SIZES = [
    # batch, prefix, context, chunk length, chunks, slots, window, heads, kv heads, head size
    (2, 3, 32, 8, 4, 4, 2, 2, 1, 16),
    (1, 0, 63, 16, 4, 5, 5, 2, 2, 8),
    (1, 4, 65, 64, 2, 20, 1, 1, 1, 32),
    (1, 2, 1, 64, 1, 1, 1, 2, 1, 80),
    (1, 5, 111, 64, 1, 7, 3, 1, 1, 16),
    (1, 1, 37, 8, 3, 2, 1, 2, 1, 8),
    (1, 2, 24, 8, 3, 8, 2, 3, 1, 80),
    (1, 1, 20, 8, 2, 3, 2, 2, 2, 96),
    (1, 3, 17, 8, 2, 0, 2, 2, 2, 16),
]
SMALLEST = (1, 3, 20, 8, 2, 4, 2, 4, 2, 16)
CASES = [*itertools.product(SIZES, [torch.float32, torch.bfloat16]), (SIZES[0], torch.float16)]


@pytest.fixture(autouse=True)
def small_tiles_and_poisoned_outputs(monkeypatch):
    """Whatever memory an operation is given holds NaN, so what a kernel does not write is seen."""
    for table in (triton_tiles.HOPPER, triton_tiles.WIDE):
        for kernel, head_size in table:
            monkeypatch.setitem(table, (kernel, head_size), SMALL[kernel])
    torch.use_deterministic_algorithms(True)
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_error_is_at_most_twice_that_of_the_plain_version(size, dtype):
    assert_close(triton_backend, size, dtype, *random_inputs(size, dtype))


@pytest.mark.parametrize("few", [0, 10**9])
def test_query_heads_are_summed_in_a_program_or_afterwards(few, monkeypatch):
    monkeypatch.setattr(triton_backend, "FEW_PROGRAMS", few)
    assert_close(triton_backend, SMALLEST, torch.float32, *random_inputs(SMALLEST, torch.float32))


def test_slots_may_be_valid_for_some_heads_only():
    size = SMALLEST
    tensors, valid, grad = random_inputs(size, torch.float32)
    by_head = valid[..., None] & (torch.rand(*valid.shape, size[8], generator=torch.Generator().manual_seed(2)) < 0.5)
    assert_close(triton_backend, size, torch.float32, tensors, by_head, grad)


def test_rows_may_lie_apart():
    size = SMALLEST
    tensors, valid, grad = random_inputs(size, torch.float32)
    apart = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors]
    for one, other in zip(run(triton_backend, size, tensors, valid, grad), run(
            triton_backend, size, apart, valid, grad.transpose(2, 3).contiguous().transpose(2, 3)), strict=True):
        assert torch.equal(one, other)


def test_invalid_slots_are_never_read():
    size = SMALLEST
    tensors, valid, grad = random_inputs(size, torch.float32)
    poisoned = [*tensors[:3], *(tensor.masked_fill(~valid[..., None, None], torch.nan) for tensor in tensors[3:])]
    clean, dirty = (run(triton_backend, size, inputs, valid, grad) for inputs in (tensors, poisoned))
    for one, other in zip(clean, dirty, strict=True):
        assert torch.equal(one, other)
    assert not dirty[4][~valid].any()
    assert not dirty[5][~valid].any()


def test_no_valid_memory_is_plain_causal_attention():
    size = SMALLEST
    tensors, valid, grad = random_inputs(size, torch.float32)
    fast = run(triton_backend, size, tensors, torch.zeros_like(valid), grad)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    out = triton_backend.causal_attention(*leaves)
    for one, other in zip(fast, [out, *torch.autograd.grad(out, leaves, grad)], strict=False):
        assert torch.equal(one, other)
    torch.testing.assert_close(out, reference.causal_attention(*tensors[:3]))
    assert not fast[4].any()


@pytest.mark.parametrize(("prefix", "length"), [(2, 9), (0, 17), (17, 20)])
def test_reference_attention_and_its_gradients(prefix, length):
    generator = torch.Generator().manual_seed(1)
    N, H, G, D = 2, 4, 2, 16
    shapes = [(length, H), (length, G), (length, G), (prefix, G), (prefix, G)]
    tensors = [torch.randn(N, rows, heads, D, generator=generator) for rows, heads in shapes]
    grad = torch.randn(N, length, H, D, generator=generator)
    results = []
    for backend in (triton_backend, reference):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = backend.reference_attention(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for fast, truth in zip(*results, strict=True):
        torch.testing.assert_close(fast, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "dtype", "message"), [
    ((1, 0, 4, 4, 1, 1, 1, 2, 1, 16), torch.float64, "float64"),
    ((1, 0, 4, 4, 1, 1, 1, 2, 1, 264), torch.float32, r"model\.head_size=264"),
    ((1, 0, 4, 4, 1, 1, 1, 3, 2, 16), torch.float32, r"model\.num_kv_heads=2"),
])
def test_what_the_kernels_cannot_do_is_refused_by_name(size, dtype, message):
    with pytest.raises(UnsupportedError, match=message):
        run(triton_backend, size, *random_inputs(size, dtype))
