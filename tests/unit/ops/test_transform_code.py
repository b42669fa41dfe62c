"""Transform codes: bits go where they lower the error most, codes are exact bytes, trellises beat scalar levels."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron_m3.ops.codec.transform import NORMAL_ERRORS, TransformCode

CLASSES, COUNT, SIZE = 3, 1000, 12


@pytest.fixture(scope="module")
def vectors():
    """Normal vectors with known covariances, different for each class, far from 0."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0, 3, SIZE).exp()
    turns = torch.linalg.qr(torch.randn(CLASSES, SIZE, SIZE, generator=generator)).Q
    drawn = torch.randn(CLASSES, COUNT, SIZE, generator=generator) * spread
    return drawn @ turns + 50 * torch.randn(CLASSES, 1, SIZE, generator=generator)


APART, TOGETHER = torch.arange(CLASSES), torch.tensor([0, 1, 0])


def after(vectors, code):
    out = torch.empty_like(vectors)
    for group in code.group_C.unique().tolist():
        chosen = code.group_C == group
        out[chosen] = code.decode(group, code.encode(group, vectors[chosen]))
    return out


def error(vectors, code):
    centred = vectors - vectors.mean(1, keepdim=True)
    return float((after(vectors, code) - vectors).square().sum() / centred.square().sum())


def even(weight=1.0):
    return weight * torch.eye(SIZE).expand(CLASSES, SIZE, SIZE)


@pytest.mark.parametrize("groups", [APART, TOGETHER])
@pytest.mark.parametrize("code_bytes", [1, 5, 12])
def test_codes_have_the_bytes_asked_for_and_the_error_that_their_bits_imply(vectors, code_bytes, groups):
    code = TransformCode.train(vectors, even(), groups, code_bytes)
    for group in groups.unique():
        count = int((groups == group).sum())
        assert code.encode(int(group), vectors[groups == group]).shape == (COUNT, code_bytes * count)
        assert code.bits_CD[groups == group].int().sum() == 8 * code_bytes * count
    variance = torch.linspace(0, 6, SIZE).exp()
    implied = sum(
        float(sum(NORMAL_ERRORS[int(bits)] * one for bits, one in zip(row, variance, strict=True)) / variance.sum())
        for row in code.bits_CD
    ) / CLASSES
    assert 0.6 * implied < error(vectors, code) < 1.2 * implied


@pytest.mark.parametrize(("bits", "most"), [(1, 0.83), (2, 0.7), (3, 0.65), (4, 0.65), (6, 0.8)])
def test_numbers_are_nearer_than_the_best_scalar_levels(bits, most):
    """As a share of the error of the best 2**bits levels for normal numbers, on numbers that taught nothing."""
    best = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 6: 0.000642}[bits]
    generator = torch.Generator().manual_seed(bits)
    taught, other = torch.randn(2, 16, 1000, 8, generator=generator)
    code = TransformCode.train(taught, torch.eye(8).expand(16, 8, 8), torch.zeros(16).long(), bits)
    assert (code.bits_CD == bits).float().mean() > 0.8
    assert (after(other, code) - other).square().mean() < most * best


def test_a_code_depends_on_its_vectors_alone(vectors):
    code = TransformCode.train(vectors[:, :500], even(), TOGETHER, 4)
    again = TransformCode.train(vectors[:, :500], even(), TOGETHER, 4)
    assert all(torch.equal(one, other) for one, other in zip(code.tensors().values(), again.tensors().values(),
                                                             strict=True))
    whole = code.encode(0, vectors[TOGETHER == 0])
    for first, last in [(0, 1), (7, 10), (255, 258), (100, 900)]:
        assert np.array_equal(code.encode(0, vectors[TOGETHER == 0, first:last]), whole[first:last])


@pytest.mark.parametrize("bits", [[8, 5, 3, 2], [1, 8], [3, 2, 2, 1, 1, 1, 1, 1, 1]])
def test_the_stream_found_is_the_best_of_all_and_is_read_back(bits):
    """Against every stream there is, where these are few."""
    from megatron_m3.ops.codec import trellis

    generator = torch.Generator().manual_seed(1)
    tables = trellis.start_tables()
    whole = (1000 * tables[torch.tensor(bits)]).round()
    numbers = (1000 * torch.randn(len(bits), 4, generator=generator)).round()
    states = trellis.search(numbers, whole, bits)
    found = (torch.stack([whole[row, state] for row, state in enumerate(states)]) - numbers).square().sum(0)
    every = torch.arange(1 << sum(bits))
    left, cost = sum(bits), torch.zeros(4, len(every))
    for row, count in enumerate(bits):
        left -= count
        cost += (whole[row, (every >> left) % trellis.STATES] - numbers[row][:, None]).square()
    assert torch.equal(found, cost.min(1).values)
    padding = -sum(bits) % 8
    kept = [*bits, padding] if padding else bits
    states = torch.cat([states, torch.zeros(1, 4).long()]) if padding else states
    ends, rows = torch.tensor(bits).cumsum(0), torch.tensor(bits)
    values = trellis.look_up(trellis.pack(states, kept), ends, rows, tables)
    assert torch.equal((1000 * values).round(), torch.stack([whole[row, states[row]] for row in range(len(bits))]))


@pytest.mark.parametrize("count", [1, 37, 64])
def test_compiled_look_ups_are_those_in_plain_torch(count):
    from megatron_m3.ops.codec import compiled_trellis, trellis

    generator = torch.Generator().manual_seed(count)
    bits = torch.tensor([8, 7, 0, 6, 5, 4, 3, 2, 2, 1, 1, 1])
    codes = torch.randint(0, 256, (count, 5), generator=generator, dtype=torch.uint8)
    starts = bits.cumsum(0) + 16 - trellis.STATE_BITS
    tables = torch.randn(trellis.MAX_BITS + 1, trellis.STATES, generator=generator)
    plain = trellis.look_up_plainly(codes, starts, bits, tables)
    assert torch.equal(compiled_trellis.look_up(codes, starts, bits, tables), plain)


def test_a_group_gives_its_bits_to_the_class_that_needs_them(vectors):
    heavy = even().clone()
    heavy[0] *= 100
    code = TransformCode.train(vectors, heavy, TOGETHER, 4)
    assert code.bits_CD[0].sum() > 1.5 * code.bits_CD[2].sum()
    assert code.bits_CD[1].sum() == 32


def test_bits_of_a_class_cannot_be_better_shared():
    from megatron_m3.ops.codec.transform import _share_bits

    variance = torch.tensor([[100.0, 10.0, 1.0, 0.1]])
    bits = _share_bits(variance, 9)[0].int().tolist()

    def cost(shared):
        return sum(NORMAL_ERRORS[count] * float(one) for count, one in zip(shared, variance[0], strict=True))

    for source in range(4):
        for target in range(4):
            moved = list(bits)
            moved[source] -= 1
            moved[target] += 1
            if min(moved) >= 0:
                assert cost(bits) <= cost(moved) + 1e-9


def test_weights_say_which_errors_matter(vectors):
    heavy = even().clone()
    heavy[:, 0, 0] = 1e4
    plain, weighted = (TransformCode.train(vectors, weights, APART, 4) for weights in (even(), heavy))

    def first(code):
        return float((after(vectors, code) - vectors)[..., 0].square().mean())

    assert first(weighted) < 0.2 * first(plain)
    assert error(vectors, weighted) > error(vectors, plain)
    scaled = TransformCode.train(vectors, even(7.0), APART, 4)
    assert error(vectors, scaled) == pytest.approx(error(vectors, plain), rel=1e-3)


def test_a_number_that_never_changes_costs_nothing(vectors):
    still = vectors.clone()
    still[..., 0] = 3.0
    code = TransformCode.train(still, even(), APART, 6)
    assert (after(still, code)[..., 0] - 3.0).abs().max() < 0.05


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [1, 64, 65, 200])
def test_compiled_and_plain_search_find_the_same(count, threads):
    from megatron_m3.ops.codec import trellis

    generator, bits = torch.Generator().manual_seed(count), [8, 7, 6, 5, 4, 3, 2, 2, 1, 1, 1]
    numbers = torch.randn(len(bits), count, generator=generator).mul(100).round()
    tables = torch.randn(len(bits), trellis.STATES, generator=generator).mul(100).round()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(trellis.search(numbers, tables, bits), trellis.search_plainly(numbers, tables, bits))
    finally:
        torch.set_num_threads(before)


ON_A_DEVICE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from megatron_m3.ops.codec import trellis

bits = [3, 2, 2, 1]
with FakeTensorMode(allow_non_fake_inputs=True):
    numbers, tables = torch.empty(4, 10, device="cuda"), torch.empty(9, trellis.STATES, device="cuda")
    codes = trellis.pack(trellis.search_plainly(numbers, tables[:4], bits), bits)
    values = trellis.look_up(codes, torch.tensor(bits).cumsum(0), torch.tensor(bits), tables)
for one in (codes, values):
    print(one.device.type, *one.shape)
"""


def test_on_a_device_streams_stay_there():
    """With tensors that have a device and a shape, but no numbers; in a process where the CPU does not stand in."""
    done = subprocess.run([sys.executable, "-c", ON_A_DEVICE], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.splitlines() == ["cuda 10 1", "cuda 4 10"]

