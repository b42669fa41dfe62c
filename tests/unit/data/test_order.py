import numpy as np
import pytest

from megatron_m3.data.order import permute, sequence_at


@pytest.mark.parametrize("size", [*range(1, 40), 64, 65, 1000, 4097])
def test_every_epoch_holds_every_sequence_once(size):
    for epoch in range(2):
        found = [sequence_at(position, size, 7) for position in range(epoch * size, (epoch + 1) * size)]
        assert sorted(found) == list(range(size))


def test_seeds_and_epochs_differ():
    orders = [[sequence_at(position, 1000, seed) for position in range(epoch * 1000, epoch * 1000 + 1000)]
              for seed in range(3) for epoch in range(3)]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            assert np.mean(np.equal(one, other)) < 0.02


def test_the_order_is_known():
    """The order must not change between versions, or a resumed run would repeat and miss sequences."""
    assert [sequence_at(position, 10, 1234) for position in range(12)] == [1, 8, 9, 2, 0, 5, 4, 3, 7, 6, 5, 4]


def test_places_are_spread_evenly():
    """Where an index goes is uniform over keys: chi-square over 16 cells, 4000 keys."""
    counts = np.bincount([permute(3, 16, key) for key in range(4000)], minlength=16)
    assert ((counts - 250) ** 2 / 250).sum() < 37.7  # 0.1 % point of 15 degrees of freedom


def test_neighbours_do_not_stay_together():
    order = np.array([permute(index, 5000, 99) for index in range(5000)])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert (np.abs(np.diff(order)) == 1).mean() < 0.002
