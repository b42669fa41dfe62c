"""Kernels of the codec and of selection on the CPU, run by test_triton_kernels.py in a process of its own.

Triton's interpreter is chosen when Triton is first imported.
"""

import pytest
import torch

from megatron_m3.errors import UnsupportedError
from megatron_m3.ops.select_tokens.triton_backend import token_weights
from tests.unit.ops import triton_checks


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Whatever memory an operation is given holds NaN, so what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("bits", "count", "scale"), [
    ([8, 7, 6, 5, 4, 3, 2, 1, 1], 3, 100), ([1, 8, 3, 3, 2, 5], 2, 100), ([2, 2, 1, 1, 1, 1], 3, 0.6), ([4], 1, 10),
    ([8, 3, 1], 2, 1e5), ([3, 2, 4, 1], 1, 0), ([3], 0, 1),
])
def test_states_are_those_of_the_plain_search(bits, count, scale):
    triton_checks.check_search(bits, count, scale, "cpu")


def test_sequences_are_searched_in_parts(monkeypatch):
    monkeypatch.setattr("megatron_m3.ops.codec.triton_trellis.PROGRAMS", 2)
    triton_checks.check_search([3, 2, 1], 5, 20, "cpu")


@pytest.mark.parametrize(("size", "code_bytes", "heads", "dtype"), [
    (24, 7, slice(None), torch.float32), (16, 3, slice(1, 3), torch.bfloat16), (80, 14, slice(0, 1), torch.float32),
])
def test_keys_and_values_are_those_of_the_codec(size, code_bytes, heads, dtype):
    triton_checks.check_decode(size, code_bytes, heads, dtype, "cpu")


@pytest.mark.parametrize(("heads", "dtype"), [(slice(None), torch.float32), (slice(1, 3), torch.bfloat16)])
def test_the_codec_decodes_at_once(heads, dtype):
    triton_checks.check_codec(16, 4, heads, dtype, "cpu")


def test_only_the_slots_of_placed_records_change():
    triton_checks.check_slots_of_a_cache("cpu")


@pytest.mark.parametrize(("size", "dtype", "rule"), [
    # tokens, lengths, heads, kv heads, head size
    ((128, [128, 63, 0], 4, 2, 80), torch.bfloat16, "softmax"),
    ((111, [111, 65], 2, 2, 16), torch.float16, "value"),
    ((65, [65, 1], 3, 1, 24), torch.float32, "exp"),
    ((1, [1, 0], 2, 1, 16), torch.float32, "softmax"),
    ((150, [150, 128, 1], 2, 1, 16), torch.bfloat16, "softmax"),
    ((131, [131], 2, 1, 16), torch.bfloat16, "exp"),
    ((4, [0], 2, 1, 16), torch.float32, "exp"),
])
def test_weights_are_those_of_the_plain_version(size, dtype, rule):
    triton_checks.check_weights(size, dtype, rule, "cpu")


def test_equal_tokens_are_taken_by_position():
    triton_checks.check_equal_tokens(torch.bfloat16, "cpu")


@pytest.mark.parametrize(("size", "dtype"), [
    # positions, sequences, heads, head size
    ((5, 2, 5, 80), torch.bfloat16), ((3, 1, 1, 16), torch.float32), ((1, 3, 40, 64), torch.float16),
    ((2, 2, 9, 256), torch.bfloat16), ((0, 2, 4, 16), torch.float32), ((1, 1, 3, 2), torch.bfloat16),
])
def test_rope_has_the_bits_of_plain_torch(size, dtype):
    triton_checks.check_rope(size, dtype, "cpu")


@pytest.mark.parametrize(("programs", "size", "dtype"), [
    # lengths, prefix, slots, heads, kv heads, head size, kv heads that read no memory
    (1, ([70, 0, 63], 4, 40, 10, 2, 80, [False, True]), torch.bfloat16),
    (1, ([5, 130], 0, 0, 3, 3, 24, []), torch.float32),
    (1, ([0], 0, 8, 4, 1, 16, []), torch.float16),
    (1, ([1, 64, 65], 3, 61, 20, 1, 32, [True]), torch.float32),
    (64, ([700, 0, 333], 3, 40, 10, 2, 80, [False, True]), torch.bfloat16),
    (64, ([600], 0, 0, 2, 2, 192, []), torch.float32),
    (64, ([450], 6, 80, 2, 1, 256, []), torch.float16),
])
def test_attention_to_a_cache_is_that_of_the_plain_version(programs, size, dtype, monkeypatch):
    monkeypatch.setattr("megatron_m3.ops.cached_attention.triton_backend.PROGRAMS", programs)
    triton_checks.check_cached_attention(size, dtype, "cpu")


@pytest.mark.parametrize(("shape", "dtype", "message"), [
    ((1, 4, 2, 16), torch.float64, "float64"), ((1, 4, 2, 264), torch.float32, r"model\.head_size=264"),
    ((1, 4, 3, 16), torch.float32, r"model\.num_kv_heads=2"),
])
def test_what_the_kernels_cannot_do_is_refused_by_name(shape, dtype, message):
    query = torch.zeros(shape, dtype=dtype)
    with pytest.raises(UnsupportedError, match=message):
        token_weights(query, query[:, :, :2], torch.tensor([4]))
