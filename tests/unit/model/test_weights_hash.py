"""The fingerprint of weights: the same for every block size, and for every way to cut a tensor."""

import pytest
import torch

from megatron_m3.model import weights_hash
from megatron_m3.model.weights_hash import MULTIPLIERS


def sum_of_whole(data, offset, shape):
    """The formula written out: position and bits of each element, mixed one by one with Python's integers."""
    total = 0
    bits = data.contiguous().view({2: torch.int16, 4: torch.int32}[data.element_size()]).reshape(-1).tolist()
    local = (1,) * (len(shape) - data.dim()) + tuple(data.shape)
    places = torch.cartesian_prod(*(torch.arange(size) for size in local)).reshape(-1, len(local)).tolist()
    for value, place in zip(bits, places, strict=True):
        position = 0
        for coordinate, first, length in zip(place, offset, shape, strict=True):
            position = position * length + first + coordinate
        mixed = weights_hash._wrap(value * MULTIPLIERS[0] + position * MULTIPLIERS[1])
        mixed = weights_hash._wrap((mixed ^ (mixed >> 29)) * MULTIPLIERS[2])
        total += mixed ^ (mixed >> 32)
    return weights_hash._wrap(total)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 22])
@pytest.mark.parametrize(("data", "offset", "shape"), [
    (torch.randn(6, 10), (0, 0), (6, 10)),
    (torch.randn(6, 10).T, (20, 6), (40, 18)),
    (torch.randn(3, 5, dtype=torch.bfloat16), (2, 4, 5), (4, 8, 30)),
    (torch.randn(9), (9,), (18,)),
])
def test_blocks_give_the_sum_of_the_formula(monkeypatch, block, data, offset, shape):
    monkeypatch.setattr(weights_hash, "BLOCK", block)
    assert weights_hash._shard_sum(data, offset, shape) == sum_of_whole(data, offset, shape)


def test_pieces_add_up_to_the_whole():
    whole = torch.randn(8, 6)
    pieces = [(whole[4 * row : 4 * row + 4, 3 * column : 3 * column + 3], (4 * row, 3 * column))
              for row in range(2) for column in range(2)]
    total = sum(weights_hash._shard_sum(piece, offset, (8, 6)) for piece, offset in pieces)
    assert weights_hash._wrap(total) == weights_hash._shard_sum(whole, (0, 0), (8, 6))


def test_known_value():
    """Recorded checkpoints and banks name their models by it, so it must never change."""
    assert weights_hash._shard_sum(torch.arange(24.0).reshape(4, 6), (0, 6), (4, 12)) == 5964712100837505201
    assert weights_hash._shard_sum(torch.tensor(3.5), (), ()) == 2748990671668048774
