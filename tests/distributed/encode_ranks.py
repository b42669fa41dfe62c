"""Ranks of test_encode_ranks: encode references under tensor parallelism, and write the memories."""

import sys
from pathlib import Path

import torch

from megatron_m3.platform import select


def main() -> None:
    torch.set_num_threads(1)
    select()
    import torch.distributed as dist

    from megatron_m3.memory import encode_references
    from megatron_m3.model.checkpoint import load_model
    from megatron_m3.platform.distributed import shut_down

    checkpoint, output = map(Path, sys.argv[1:])
    loaded = load_model(checkpoint, tensor=2)
    generator = torch.Generator().manual_seed(0)
    memories = encode_references(loaded, torch.randint(2, 300, (9, 16), generator=generator), torch.arange(1, 10))
    torch.save(vars(memories), output / f"{dist.get_rank()}.pt")
    shut_down()


if __name__ == "__main__":
    main()
