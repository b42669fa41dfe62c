"""Encoding under tensor parallelism gives every rank the whole memories of one process."""

import dataclasses

import torch

from tests.launcher import run_ranks
from tests.tiny_model import joined_world, tiny_model


def test_two_tensor_parallel_ranks_write_the_memories_of_one(tmp_path):
    with joined_world():
        from megatron_m3.memory import encode_references
        from megatron_m3.model.checkpoint import save_checkpoint

        loaded = tiny_model(tmp_path, memory__layers="0,2")
        data = dataclasses.replace(loaded.config.data, tokenizer=str(tmp_path / "tokenizer"))
        save_checkpoint(tmp_path / "run", 1, [loaded.model], dataclasses.replace(loaded.config, data=data))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(2, 300, (9, 16), generator=generator)
        alone = encode_references(loaded, tokens, torch.arange(1, 10))
    run_ranks("tests.distributed.encode_ranks", 2, [str(tmp_path / "run"), str(tmp_path)])
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found["kv"], alone.kv, rtol=1e-5, atol=1e-5)
        assert torch.equal(found["positions"], alone.positions)
        assert torch.equal(found["num_kept"], alone.num_kept)
