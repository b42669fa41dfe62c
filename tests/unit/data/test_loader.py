import gc
import itertools
import threading
from dataclasses import replace

import pytest
import torch

from megatron_m3.data import TrainingDataset, build_loader
from megatron_m3.data.loader import ReadAhead
from megatron_m3.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def config(small):
    config = small.config(stage="continual", global_batch=8, micro_batch=2)
    return replace(config, data=replace(config.data, encode_once=False))


@pytest.fixture(scope="module")
def dataset(config):
    return TrainingDataset(config)


def with_loader(config, name, encode_once=False):
    return replace(config, data=replace(config.data, loader=name, encode_once=encode_once))


def read(config, dataset, count, consumed=0, rank=0, ranks=1):
    return list(itertools.islice(
        build_loader(config, dataset, consumed=consumed, data_rank=rank, data_size=ranks), count))


def same(one, other):
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
        for a, b in zip(one, other, strict=True))


def test_torch_and_dali_give_the_same_batches_over_epochs(config, dataset):
    count = 2 * len(dataset) // 2 + 3
    for once in (False, True):
        by_torch, by_dali = (read(with_loader(config, name, once), dataset, count) for name in ("torch", "dali"))
        assert same(by_torch, by_dali)
        assert (len({batch["references"].shape[1] for batch in by_torch}) > 1) == once


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_batch_is_what_the_dataset_holds(config, dataset, loader):
    batch = read(with_loader(config, loader), dataset, 1)[0]
    assert batch["context"].shape == (2, 32)
    assert batch["references"].shape == (2, 4, 16)
    assert {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in batch.items()} == {
        name: str(array.dtype) for name, array in dataset[0].items()}


@pytest.mark.parametrize(("micro_batch", "ranks"), [(1, 1), (1, 4), (2, 2), (4, 2), (8, 1)])
def test_a_global_batch_is_the_same_in_every_layout(config, dataset, micro_batch, ranks):
    plain = torch.cat([batch["labels"] for batch in read(config, dataset, 12)])
    laid = replace(config, training=replace(config.training, micro_batch=micro_batch))
    per_rank = 24 // (micro_batch * ranks)
    parts = [read(laid, dataset, per_rank, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat([batch["labels"] for step in zip(*parts, strict=True) for batch in step]), plain)


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_going_on_from_consumed_equals_never_stopping(config, dataset, loader):
    config = with_loader(config, loader)
    assert same(read(config, dataset, 20)[12:], read(config, dataset, 8, consumed=24))


def test_the_seed_changes_the_order(config, dataset):
    other = replace(config, data=replace(config.data, seed=1))
    assert not same(read(config, dataset, 4), read(other, dataset, 4))


def test_ranks_that_do_not_fill_the_global_batch_are_refused(config, dataset):
    with pytest.raises(ConfigError, match=r"training.global_batch=8: must be a multiple of .*micro_batch=2 .* 3 data"):
        build_loader(config, dataset, consumed=0, data_rank=0, data_size=3)


def test_batches_are_read_before_they_are_asked_for():
    taken, enough = [], threading.Event()

    def source():
        for number in range(100):
            taken.append(number)
            if number == 4:
                enough.set()
            yield number

    ahead = ReadAhead(source(), 4)
    assert enough.wait(10)  # 4 are ready, and one more waits for room
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    assert len(taken) < 10


def test_the_end_and_errors_arrive_in_their_turn():
    def source():
        yield 1
        raise DataError("broken")

    ahead = ReadAhead(source(), 4)
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(DataError, match="broken"):
            next(ahead)
    assert list(ReadAhead(iter([1, 2]), 1)) == [1, 2]


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_an_error_while_reading_reaches_the_training_loop(config, dataset, loader):
    class Broken(TrainingDataset):
        def __init__(self):
            self.__dict__ = dataset.__dict__

        def __getitem__(self, index):
            raise DataError("tokens.bin: cannot be read")

    with pytest.raises(DataError, match="cannot be read"):
        read(with_loader(config, loader), Broken(), 1)


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_dropped_loader_ends_its_thread(config, dataset, loader):
    before = set(threading.enumerate())
    reader = build_loader(with_loader(config, loader), dataset, consumed=0, data_rank=0, data_size=1)
    next(reader)
    (thread,) = set(threading.enumerate()) - before
    del reader
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()
