"""RAM cache and the two sources: warm equals cold, the budget holds, hits are counted."""

import numpy as np
import pytest
import torch

from tests.unit.memory.test_bank import build  # noqa: F401


def one(memories, id):
    return memories[id : id + 1]


def test_the_least_recently_used_memory_goes(memories):
    from megatron_m3.memory import MemoryCache

    size = sum(part.numel() * part.element_size() for part in vars(one(memories, 0)).values())
    cache = MemoryCache(3 * size + size // 2)
    for id in (0, 1, 2):
        cache.put(id, one(memories, id))
    assert cache.get(0) is not None
    cache.put(3, one(memories, 3))
    assert [cache.get(id) is not None for id in range(4)] == [True, False, True, True]
    assert (cache.hits, cache.misses, len(cache), cache.bytes) == (4, 1, 3, 3 * size)
    cache.put(3, one(memories, 3))
    assert (len(cache), cache.bytes) == (3, 3 * size)
    assert torch.equal(cache.get(2).kv, one(memories, 2).kv)


def test_a_budget_too_small_keeps_nothing(memories):
    from megatron_m3.memory import MemoryCache

    for budget in (0, 100):
        cache = MemoryCache(budget)
        cache.put(0, one(memories, 0))
        assert (len(cache), cache.bytes, cache.get(0)) == (0, 0, None)


def test_kept_memories_hold_no_larger_tensor_alive(memories):
    from megatron_m3.memory import MemoryCache

    cache = MemoryCache(1 << 20)
    cache.put(0, one(memories, 0))
    kept = cache.get(0)
    assert kept.kv.untyped_storage().nbytes() == kept.kv.numel() * 4


@pytest.mark.parametrize("codec", ["none", "SQ8"])
@pytest.mark.parametrize("cache_bytes", [0, 9000, 1 << 20])
def test_warm_equals_cold(loaded, references, memories, build, tmp_path, codec, cache_bytes):  # noqa: F811
    from megatron_m3.memory import ColdSource, MemoryBank, WarmSource

    bank = MemoryBank.open(build(tmp_path / "bank", codec=codec))
    warm = WarmSource(bank, cache_bytes=cache_bytes)
    cold = ColdSource(loaded, references, codec=bank.codec, cache_bytes=cache_bytes)
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
        assert source.cache.hits + source.cache.misses == 8
        assert source.cache.bytes <= cache_bytes
        assert hits is None or source.cache.hits == hits


def test_a_source_reads_each_missing_memory_once(loaded, references):
    from megatron_m3.memory import ColdSource

    asked = []

    class Noting:
        def tokens(self, ids):
            asked.append(list(ids))
            return references.tokens(ids)

    source = ColdSource(loaded, Noting())
    source.fetch([7, 7, 8])
    source.fetch([8, 9, 7])
    assert asked == [[7, 8], [9]]
