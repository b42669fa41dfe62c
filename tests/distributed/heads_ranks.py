"""Ranks of test_head_ranks: generate with memories of a bank under tensor parallelism, each rank with its own heads."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_m3.platform import select


class CountingStorage:
    """A storage, and the bytes that were read from it."""

    threads, records, gap, bytes = 2, 4, 0, 0

    def __init__(self, storage: Any) -> None:
        self.storage = storage

    def read(self, name: str, offset: int, buffers: Sequence[np.ndarray]) -> None:
        """Read and count."""
        self.storage.read(name, offset, buffers)
        self.bytes += sum(buffer.nbytes for buffer in buffers)


def main() -> None:
    """``heads_ranks FOLDER BANK``: reads a run, a bank and a knowledge base there, writes what rank 0 generates."""
    torch.set_num_threads(1)
    select()
    import torch.distributed as dist

    from megatron_m3.inference.engine import Engine
    from megatron_m3.inference.forward import delivery, local_kv_heads
    from megatron_m3.memory import MemoryBank, WarmSource
    from megatron_m3.model.checkpoint import load_model
    from megatron_m3.platform.distributed import shut_down
    from megatron_m3.retrieval import Retriever
    from tests.tiny_model import sentence

    folder = Path(sys.argv[1])
    loaded = load_model(folder / "run", tensor=int(os.environ["WORLD_SIZE"]))
    bank = MemoryBank.open(folder / sys.argv[2], weights_hash=loaded.weights_hash)
    loaded = replace(loaded, config=bank.configure(loaded.config))
    mine, ids = local_kv_heads(loaded.config), list(range(0, len(bank), 3))
    part, whole = bank.read(ids, kv_heads=mine), bank.read(ids)
    assert torch.equal(part.kv, whole.kv[:, :, :, mine])
    retriever = Retriever.open(folder / "index", folder / "references", loaded.tokenizer)
    bank.reader.storage = counting = CountingStorage(bank.reader.storage)
    engine = Engine(loaded, retriever, WarmSource(bank, delivery(loaded)), prefetch_tokens=3)
    found, statistics = engine.generate([sentence(seed, 9) for seed in range(3)], 20, stop_at_eos=False)
    part_bytes, others = bank.record.part(mine)[0].record_bytes, dist.get_world_size() - 1
    assert counting.bytes >= part_bytes * len(statistics.seen)
    assert counting.bytes % part_bytes == 0
    if bank.record.held_LG.all():  # an equal share each, but for the 4 bytes that say how many tokens there are
        assert part_bytes * (1 + others) == bank.record_bytes + 4 * others
    if dist.get_rank() == 0:
        (folder / "generated.json").write_text(json.dumps([one.tokens for one in found]))
    shut_down()


if __name__ == "__main__":
    main()
