"""Ranks of test_convert_layouts: the blocks of weights that megatron-core lets each rank of a layout store."""

import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_m3.platform import select


def main() -> None:
    """``convert_blocks CHECKPOINT OUTPUT``: the checkpoint's own layout decides."""
    torch.set_num_threads(1)
    select()
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

    from megatron_m3.model.checkpoint import load_model
    from megatron_m3.model.weights_hash import sharded_state
    from megatron_m3.platform.distributed import shut_down

    loaded = load_model(Path(sys.argv[1]), tensor=2, pipeline=2)
    state = sharded_state([loaded.model])
    apply_factories(state)
    mine = [(dist.get_rank(), shard.key, list(shard.global_offset)) for shard in nested_values(state)
            if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id)]
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(list(itertools.chain.from_iterable(parts))))
    shut_down()


if __name__ == "__main__":
    main()
