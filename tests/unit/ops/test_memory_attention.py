"""The torch backend against the reference, outputs and every gradient, at odd sizes."""

import itertools

import pytest
import torch

from megatron_m3.ops.memory_attention import get_backend, reference, torch_backend

SIZES = [
    # batch, prefix, context, chunk length, chunks, slots, window, heads, kv heads, head size
    (2, 3, 32, 8, 4, 4, 2, 4, 2, 16),
    (1, 0, 63, 16, 4, 5, 5, 6, 3, 8),
    (2, 4, 65, 64, 2, 40, 1, 4, 4, 32),
    (1, 2, 1, 64, 1, 1, 1, 2, 1, 80),
    (3, 5, 111, 64, 1, 7, 3, 4, 1, 16),
    (2, 1, 37, 8, 3, 2, 2, 4, 2, 8),
    (2, 3, 17, 8, 2, 0, 2, 4, 2, 16),
    (1, 0, 111, 16, 4, 5, 5, 6, 3, 192),
    (1, 2, 63, 8, 3, 8, 2, 3, 1, 256),
]


def random_inputs(size, dtype, seed=0):
    B, P, S, _, C, M, _, H, G, D = size
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    T = P + S
    tensors = [draw(B, T, H, D), draw(B, T, G, D), draw(B, T, G, D), draw(B, C, M, G, D), draw(B, C, M, G, D)]
    valid = torch.rand(B, C, M, generator=generator) < 0.7
    return tensors, valid, draw(B, T, H, D)


def sharpened(tensors):
    """The same inputs with scores in the hundreds, which 16 bits would round to whole numbers."""
    query, key, value, memory_key, memory_value = tensors
    return [40 * query, 8 * key, value, 8 * memory_key, memory_value]


def run(backend, size, tensors, valid, grad):
    _, P, _, L, _, _, W, *_ = size
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = backend.memory_attention(*leaves, valid, prefix_length=P, chunk_length=L, window=W)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_error_at_most_twice(fast, plain, exact, dtype):
    """Each of the fast results is at most twice as far from the exact one as the plain one of the same dtype is."""
    for one, other, truth in zip(fast, plain, exact, strict=True):
        if truth.numel():
            floor = 8 * torch.finfo(dtype).eps * truth.abs().max()
            assert (one.double() - truth).abs().max() <= 2 * (other.double() - truth).abs().max() + floor


def assert_close(backend, size, dtype, tensors, valid, grad):
    """Output and gradients of ``backend`` against the reference in fp64 and in ``dtype``."""
    exact = run(reference, size, [tensor.double() for tensor in tensors], valid, grad.double())
    plain = run(reference, size, tensors, valid, grad)
    assert_error_at_most_twice(run(backend, size, tensors, valid, grad), plain, exact, dtype)


@pytest.mark.parametrize("size", SIZES)
def test_torch_backend_equals_reference_in_fp64(size):
    tensors, valid, grad = random_inputs(size, torch.float64)
    for fast, truth in zip(
        run(torch_backend, size, tensors, valid, grad), run(reference, size, tensors, valid, grad), strict=True
    ):
        torch.testing.assert_close(fast, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("size", "dtype"), itertools.product(SIZES, [torch.float32, torch.bfloat16, torch.float16]))
def test_error_is_at_most_twice_that_of_the_plain_version(size, dtype):
    assert_close(torch_backend, size, dtype, *random_inputs(size, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_scores_keep_their_digits(dtype):
    tensors, valid, grad = random_inputs(SIZES[0], dtype)
    assert_close(torch_backend, SIZES[0], dtype, sharpened(tensors), valid, grad)


def test_invalid_slots_are_never_read():
    size = SIZES[0]
    tensors, valid, grad = random_inputs(size, torch.float32)
    poisoned = [*tensors[:3], *(tensor.masked_fill(~valid[..., None, None], torch.nan) for tensor in tensors[3:])]
    for backend in (reference, torch_backend):
        clean, dirty = run(backend, size, tensors, valid, grad), run(backend, size, poisoned, valid, grad)
        for one, other in zip(clean, dirty, strict=True):
            assert torch.equal(one, other)
        assert not dirty[4][~valid].any()
        assert not dirty[5][~valid].any()


@pytest.mark.parametrize("size", SIZES)
def test_slots_may_be_valid_for_some_heads_only(size):
    tensors, valid, grad = random_inputs(size, torch.float64)
    heads = size[8]
    by_head = valid[..., None] & (torch.rand(*valid.shape, heads, generator=torch.Generator().manual_seed(2)) < 0.5)
    fast, truth = (run(backend, size, tensors, by_head, grad) for backend in (torch_backend, reference))
    for one, other in zip(fast, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    repeat = size[7] // heads
    for head in range(heads):
        queries = slice(head * repeat, (head + 1) * repeat)
        alone = [tensors[0][:, :, queries], *(tensor[..., head : head + 1, :] for tensor in tensors[1:])]
        out = run(reference, size, alone, by_head[..., head], grad[:, :, queries])[0]
        torch.testing.assert_close(truth[0][:, :, queries], out, rtol=1e-9, atol=1e-9)


def test_no_valid_memory_is_plain_causal_attention():
    size = SIZES[0]
    tensors, valid, grad = random_inputs(size, torch.float32)
    out = run(torch_backend, size, tensors, torch.zeros_like(valid), grad)[0]
    torch.testing.assert_close(out, reference.causal_attention(*tensors[:3]))


def test_the_same_inputs_give_the_same_bits():
    size = SIZES[2]
    first, *others = (run(torch_backend, size, *random_inputs(size, torch.bfloat16)) for _ in range(3))
    assert all(torch.equal(one, other) for again in others for one, other in zip(first, again, strict=True))


def test_a_sequence_reads_its_own_memories_whatever_stands_beside_it():
    size = SIZES[0]
    tensors, valid, grad = random_inputs(size, torch.float32)
    whole = run(torch_backend, size, tensors, valid, grad)
    for row in range(2):
        alone = run(torch_backend, size, [tensor[row : row + 1] for tensor in tensors], valid[row : row + 1],
                    grad[row : row + 1])
        for one, other in zip(whole, alone, strict=True):
            torch.testing.assert_close(one[row : row + 1], other, rtol=1e-5, atol=1e-6)


def test_a_chunk_reads_its_window_and_nothing_else():
    B, P, S, L, C, M, W = 1, 2, 32, 8, 4, 3, 2
    visible = reference.visible_memories(S, C, L, W, M).reshape(S, C, M)
    for position, chunk in itertools.product(range(S), range(C)):
        assert visible[position, chunk].all() == visible[position, chunk].any() == (position // L - chunk in range(W))
    assert (B, P) == (1, 2)


@pytest.mark.parametrize("backend", [torch_backend, reference])
def test_reference_attention_equals_each_reference_alone(backend):
    generator = torch.Generator().manual_seed(1)
    N, P, T, H, G, D = 3, 2, 9, 4, 2, 8
    query, key, value = (torch.randn(N, T, heads, D, generator=generator) for heads in (H, G, G))
    prefix_key, prefix_value = (torch.randn(N, P, G, D, generator=generator) for _ in range(2))
    joint = backend.reference_attention(query, key, value, prefix_key, prefix_value)
    for n in range(N):
        whole_key, whole_value = torch.cat([prefix_key[n], key[n]])[None], torch.cat([prefix_value[n], value[n]])[None]
        whole_query = torch.cat([torch.zeros(P, H, D), query[n]])[None]
        alone = reference.causal_attention(whole_query, whole_key, whole_value)[0, P:]
        torch.testing.assert_close(joint[n], alone)


def test_unknown_backend_is_refused_by_name():
    with pytest.raises(Exception, match=r"model\.attention=fast"):
        get_backend("fast")
