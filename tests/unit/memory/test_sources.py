"""RAM cache and the two sources: warm equals cold, the budget holds, hits are counted."""

import numpy as np
import pytest
import torch

from tests.unit.memory.test_bank import build  # noqa: F401


def rows_of(memories, ids):
    return [part[ids] for part in (memories.kv, memories.positions, memories.num_kept)]


def size_of(memories):
    return sum(part[0].nbytes for part in (memories.kv, memories.positions, memories.num_kept))


def ids_in(cache, ids):
    return [id for id in ids if id in cache]


def test_the_least_recently_used_memory_goes(memories):
    from megatron_m3.memory import MemoryCache

    size = size_of(memories)
    cache = MemoryCache(3 * size + size // 2, 400)
    cache.put(np.array([0, 1, 2]), rows_of(memories, [0, 1, 2]))
    here, found = cache.take(np.array([9, 0]))
    assert here.tolist() == [False, True]
    assert torch.equal(found[0][0], memories.kv[0])
    cache.put(np.array([3]), rows_of(memories, [3]))
    assert ids_in(cache, range(10)) == [0, 2, 3]
    assert (len(cache), cache.bytes) == (3, 3 * size)
    cache.put(np.array([3, 2]), rows_of(memories, [3, 2]))
    assert (len(cache), cache.bytes) == (3, 3 * size)
    cache.put(np.arange(10, 20), rows_of(memories, range(10, 20)))
    assert ids_in(cache, range(20)) == [17, 18, 19]
    here, found = cache.take(np.array([19, 17]))
    assert here.all()
    assert torch.equal(found[0], memories.kv[[19, 17]])


def test_a_budget_too_small_keeps_nothing(memories):
    from megatron_m3.memory import MemoryCache

    for budget in (0, 100):
        cache = MemoryCache(budget, 400)
        cache.put(np.array([0]), rows_of(memories, [0]))
        assert (len(cache), cache.bytes, cache.take(np.array([0]))[0].tolist()) == (0, 0, [False])


def test_what_is_kept_in_one_thread_may_be_overwritten_in_another(memories):
    from megatron_m3.memory import MemoryCache

    cache = MemoryCache(size_of(memories), 400)
    with torch.inference_mode():
        cache.put(np.array([0]), [part.clone() for part in rows_of(memories, [0])])
    cache.put(np.array([1]), rows_of(memories, [1]))
    assert torch.equal(cache.take(np.array([1]))[1][0][0], memories.kv[1])


@pytest.mark.parametrize("codec", ["none", "SQ8"])
@pytest.mark.parametrize("cache_bytes", [0, 9000, 1 << 20])
def test_warm_equals_cold(loaded, references, memories, build, tmp_path, codec, cache_bytes):  # noqa: F811
    from megatron_m3.memory import ColdSource, MemoryBank, WarmSource

    bank = MemoryBank.open(build(tmp_path / "bank", codec=codec))
    budgets = {"cache_bytes": cache_bytes, "decoded_bytes": cache_bytes}
    warm, cold = WarmSource(bank, **budgets), ColdSource(loaded, references, codec=bank.codec, **budgets)
    expected = bank.codec.round_trip(memories)
    for ids in ([4, 9, 4, 200], [200, 3], [], [9, 3, 399]):
        first, second = warm.fetch(np.array(ids, np.int64)), cold.fetch(ids)
        # a number on the border of two codes may fall to either
        step = (expected.kv.max() - expected.kv.min()) / 200 if codec == "SQ8" else 1e-5
        for found in (first, second):
            assert found.kv.shape == expected.kv[ids].shape
            assert (found.kv - expected.kv[ids]).abs().max() <= step if ids else True
            assert torch.equal(found.positions, expected.positions[ids])
            assert torch.equal(found.num_kept, expected.num_kept[ids])
        torch.testing.assert_close(first.kv, second.kv, rtol=0, atol=float(step))
    for source in (warm, cold):
        hits = {0: 0, 9000: None, 1 << 20: 3}[cache_bytes]
        assert source.counts.decoded_hits + source.counts.record_hits + source.counts.misses == 8
        assert max(source.decoded.bytes, source.records.bytes) <= cache_bytes
        assert hits is None or source.counts.decoded_hits == hits


def test_a_source_reads_each_missing_memory_once(loaded, references):
    from megatron_m3.memory import ColdSource

    asked = []

    class Noting:
        hash = references.hash

        def __len__(self):
            return len(references)

        def tokens(self, ids):
            asked.append(list(ids))
            return references.tokens(ids)

    source = ColdSource(loaded, Noting())
    source.fetch([7, 7, 8])
    source.fetch([8, 9, 7])
    assert asked == [[7, 8], [9]]


def test_codes_become_numbers_on_the_device_that_wants_them(loaded, references, build, tmp_path):  # noqa: F811
    from megatron_m3.memory import ColdMemories, Delivery, MemoryBank, MemorySource

    bank = MemoryBank.open(build(tmp_path / "bank", codec="SQ8"))
    for records in (bank, ColdMemories(loaded, references)):
        assert records.codec.device.type == "cpu"
        MemorySource(records, Delivery(device="meta"))
        assert records.codec.device.type == "meta"


def test_memories_come_in_the_number_type_that_is_wanted(memories, build, tmp_path):  # noqa: F811
    from megatron_m3.memory import Delivery, MemoryBank, MemorySource

    bank = MemoryBank.open(build(tmp_path / "bank", codec="SQ8"))
    narrow = MemorySource(bank, Delivery(dtype=torch.bfloat16)).fetch([3, 8])
    assert torch.equal(narrow.kv, MemorySource(bank).fetch([3, 8]).kv.bfloat16())
