"""Reading ahead: fetches find what was brought, wait for what is under way alone, and have errors of their own."""

import shutil
import threading

import pytest
import torch

from megatron_m3.errors import ArtifactError
from tests.unit.memory.test_bank import build, open_bank  # noqa: F401


@pytest.fixture(scope="module")
def folder_of_bank(folder, build):  # noqa: F811
    return build(folder / "bank", codec="KLT6")


class Watched:
    """A storage that notes what is read, and can be made to wait or fail."""

    threads, records, gap = 8, 4, 0

    def __init__(self, storage):
        self.storage, self.offsets, self.gate, self.begun, self.error = storage, [], None, threading.Event(), None

    def read(self, name, offset, buffers):
        self.begun.set()
        if self.gate is not None:
            assert self.gate.wait(30)
        error, self.error = self.error, None
        if error is not None:
            raise error
        self.offsets.append((name, offset))
        self.storage.read(name, offset, buffers)


@pytest.fixture
def bank(folder_of_bank):
    bank = open_bank(folder_of_bank)
    bank.reader.storage = Watched(bank.reader.storage)
    return bank


def settled(source):
    for future in list(source._under_way.values()):
        future.exception()
    while source._under_way:
        threading.Event().wait(0.001)
    return source


def equal(one, other):
    return all(torch.equal(value, getattr(other, name)) for name, value in vars(one).items())


@pytest.mark.parametrize("budgets", [{}, {"decoded_bytes": 0}, {"cache_bytes": 0}])
def test_what_was_brought_is_not_read_again(bank, folder_of_bank, budgets):
    from megatron_m3.memory import WarmSource

    source, ids = WarmSource(bank, **budgets), [5, 70, 5, 300, 6]
    source.prefetch([70, 5, 300, 399])
    settled(source)
    bank.reader.storage.offsets.clear()
    assert equal(source.fetch(ids), open_bank(folder_of_bank).read(ids))
    assert bank.reader.storage.offsets == [("shard_000000.bin", 6 * bank.record_bytes)]
    counts = source.counts
    assert (counts.prefetched, counts.useful, counts.misses) == (4, 3, 1)
    assert counts.decoded_hits + counts.record_hits == 3
    source.prefetch([70, 6])
    assert settled(source).counts.prefetched == 4


def test_without_a_cache_nothing_is_brought(bank):
    from megatron_m3.memory import WarmSource

    source = WarmSource(bank, cache_bytes=0, decoded_bytes=0)
    source.prefetch([1, 2])
    assert not source._under_way
    assert not bank.reader.storage.offsets


def test_a_fetch_waits_for_what_is_under_way_alone(bank, folder_of_bank):
    from megatron_m3.memory import WarmSource

    expected = open_bank(folder_of_bank).read(range(400))
    source, storage = WarmSource(bank), bank.reader.storage
    gate = storage.gate = threading.Event()
    source.prefetch([1])
    assert storage.begun.wait(30)
    storage.gate = None
    source.prefetch([2, 3])  # behind the first, which waits
    assert equal(source.fetch([3, 200]), expected[[3, 200]])
    assert (source.counts.prefetched, source.counts.useful, source.counts.wait_seconds < 10) == (1, 0, True)
    threading.Timer(0.2, gate.set).start()
    assert equal(source.fetch([1]), expected[[1]])
    assert source.counts.wait_seconds > 0.05
    assert (source.counts.useful, [offset for _, offset in storage.offsets].count(bank.record_bytes)) == (1, 1)


def test_a_damaged_record_that_was_brought_is_refused_when_it_is_fetched(folder_of_bank, tmp_path):
    from megatron_m3.memory import WarmSource

    shutil.copytree(folder_of_bank, tmp_path / "bank")
    bank = open_bank(tmp_path / "bank")
    path = tmp_path / "bank/shard_000000.bin"
    data = bytearray(path.read_bytes())
    data[7 * bank.record_bytes + 1] ^= 1
    path.write_bytes(data)
    source = WarmSource(bank)
    source.prefetch([6, 7, 8])
    settled(source)
    assert equal(source.fetch([6, 8]), open_bank(folder_of_bank).read([6, 8]))
    with pytest.raises(ArtifactError, match="the record of reference 7 is damaged"):
        source.fetch([7])
    assert source.counts.prefetched == 0


def test_errors_of_the_thread_are_not_those_of_the_fetch(bank, folder_of_bank):
    """It reads what it wants itself, and meets what is still wrong with that."""
    from megatron_m3.memory import WarmSource

    source, storage = WarmSource(bank), bank.reader.storage
    gate, storage.error = threading.Event(), ZeroDivisionError("in the thread")
    storage.gate = gate
    source.prefetch([6, 9])
    assert storage.begun.wait(30)
    threading.Timer(0.05, gate.set).start()
    assert equal(source.fetch([6]), open_bank(folder_of_bank).read([6]))
    assert source.counts.prefetched == 0
    storage.error = ZeroDivisionError("in the fetch")
    with pytest.raises(ZeroDivisionError, match="in the fetch"):
        source.fetch([9])


def test_restricted_heads_are_kept_without_zeros(build, tmp_path):  # noqa: F811
    from megatron_m3.memory import WarmSource
    from megatron_m3.memory.sources import Delivery

    bank = open_bank(build(tmp_path / "bank", codec="none", memory_heads="0:1;2:0,1"))
    source = WarmSource(bank)
    assert equal(source.fetch([9, 3]), bank.read([9, 3]))
    assert equal(source.fetch([3, 9, 3]), bank.read([3, 9, 3]))
    lists = bank.read([3]).kv.nbytes * 3 // 4
    assert source.decoded.row_bytes == lists + 2 * 2 * 4 * 2 + 4
    half = WarmSource(bank, Delivery(heads=slice(0, 1), dtype=torch.bfloat16))
    for _ in range(2):
        assert torch.equal(half.fetch([9, 3]).kv, bank.read([9, 3], kv_heads=slice(0, 1)).kv.bfloat16())
    assert half.records.row_bytes < source.records.row_bytes / 2
    assert half.decoded.row_bytes == 2 * 4 * 16 * 2 + 2 * 1 * 4 * 2 + 4
