"""Kernels of the codec and of selection on a CUDA device, at the sizes that they are for."""

import itertools

import pytest
import torch

from tests.unit.ops import triton_checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and pytest -m gpu"),
]


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Whatever memory an operation is given holds NaN, so what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(2, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("bits", "count", "scale"), [
    ([8] * 3 + [7, 6, 6, 5, 5, 4, 4] + [3] * 30 + [2] * 60 + [1] * 90, 600, 100), ([1, 8, 3, 3, 2, 5], 70, 100),
    ([2, 2, 1, 1, 1, 1], 1000, 0.6), ([4], 1, 10), ([8, 3, 1], 50, 1e5), ([3, 2, 4, 1], 1, 0), ([3], 0, 1),
])
def test_states_are_those_of_the_plain_search(bits, count, scale):
    triton_checks.check_search(bits, count, scale, "cuda")


def test_sequences_are_searched_in_parts(monkeypatch):
    monkeypatch.setattr("megatron_m3.ops.codec.triton_trellis.PROGRAMS", 64)
    triton_checks.check_search([3, 2, 2, 1, 1], 150, 20, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "code_bytes", "heads"), [
    (80, 28, slice(None)), (64, 28, slice(1, 3)), (24, 7, slice(None)), (128, 45, slice(0, 1)), (256, 90, slice(None)),
])
def test_keys_and_values_are_those_of_the_codec(size, code_bytes, heads, dtype):
    triton_checks.check_decode(size, code_bytes, heads, dtype, "cuda")


@pytest.mark.parametrize(("heads", "dtype"), [(slice(None), torch.float32), (slice(1, 3), torch.bfloat16)])
def test_the_codec_decodes_at_once(heads, dtype):
    triton_checks.check_codec(80, 28, heads, dtype, "cuda")


def test_only_the_slots_of_placed_records_change():
    triton_checks.check_slots_of_a_cache("cuda")


@pytest.mark.parametrize(("size", "dtype", "rule"), itertools.product([
    # tokens, lengths, heads, kv heads, head size
    (128, [128, 63, 0, 111, 65, 1], 40, 8, 80), (111, [111, 65], 9, 3, 64), (65, [65, 1], 3, 1, 24),
    (1, [1, 0], 2, 1, 16), (700, [700, 129, 128, 1], 4, 2, 128), (129, [129], 2, 2, 256), (127, [127], 4, 1, 192),
], [torch.bfloat16, torch.float16, torch.float32], ["softmax", "exp", "value"]))
def test_weights_are_those_of_the_plain_version(size, dtype, rule):
    triton_checks.check_weights(size, dtype, rule, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [
    (2051, 2, 40, 80), (2051, 2, 8, 80), (111, 1, 32, 64), (1, 32, 9, 64), (63, 1, 3, 256),
])
def test_rope_has_the_bits_of_plain_torch(size, dtype):
    triton_checks.check_rope(size, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [
    # lengths, prefix, slots, heads, kv heads, head size, kv heads that read no memory
    ([70, 0, 63, 500], 4, 40, 40, 8, 80, [False, True] * 4), ([128] * 32, 4, 40, 32, 8, 64, []),
    ([5, 4000], 0, 0, 3, 3, 24, []), ([900], 3, 640, 20, 1, 32, [True]), ([450], 6, 80, 2, 1, 256, []),
    ([600, 1], 0, 0, 4, 2, 192, []), ([0], 0, 8, 4, 1, 128, []),
])
def test_attention_to_a_cache_is_that_of_the_plain_version(size, dtype):
    triton_checks.check_cached_attention(size, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_tokens_are_taken_by_position(dtype):
    triton_checks.check_equal_tokens(dtype, "cuda")
