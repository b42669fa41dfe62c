"""A fingerprint of a model's weights that does not depend on how they are laid over processes.

Every weight's bits are mixed with the position that it has in its global tensor, and the mixtures are added up modulo
2^64: a sum has no order, so shards of any layout give the same one. The sums of all tensors, sorted by name, go into
one SHA-256.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_m3.manifest import hash_json

BLOCK = 1 << 18
MULTIPLIERS = (-7046029254386353131, -4417276706812531889, -7723592293110705685)
BIT_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sharding_metadata() -> dict[str, Any]:
    """What dist_checkpointing is told, so that optimizer states fit any layout; a new one, since it is added to."""
    return {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_state(models: Sequence[Any], *, by_layer: bool = False) -> dict[str, Any]:
    """The sharded state of all model chunks of this process, keyed as dist_checkpointing wants it.

    ``by_layer`` gives each layer tensors of its own, where they are else parts of one over all layers.
    """
    metadata = sharding_metadata() | {"non_homogeneous_layers": by_layer}
    states = [model.sharded_state_dict(metadata=metadata) for model in models]
    return {"model": states[0]} if len(states) == 1 else {f"model{index}": part for index, part in enumerate(states)}


def weights_hash(models: Sequence[Any]) -> str:
    """The fingerprint, as hexadecimal SHA-256; a collective over all processes, the same for every layout.

    Args:
        models: model chunks of this process (GPTModel, wrapped or not).
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

    state = sharded_state(models)
    apply_factories(state)
    sums = WeightSums()
    for shard in nested_values(state):
        if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id):
            sums.add(shard.key, shard.data, shard.global_offset, shard.global_shape)
    gathered: list[Any] = [sums.tensors]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, sums.tensors)
    whole = WeightSums()
    for part in gathered:
        for key, (dtype, shape, total) in part.items():
            whole.add_sum(key, dtype, shape, total)
    return whole.hash()


class WeightSums:
    """The fingerprint as it grows, shard by shard."""

    def __init__(self) -> None:
        self.tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}

    def add(self, key: str, data: torch.Tensor, offset: Sequence[int], shape: Sequence[int]) -> None:
        """Count the shard ``data``, at ``offset`` in the global tensor ``key`` of ``shape``; each shard once."""
        self.add_sum(key, str(data.dtype), tuple(shape), _shard_sum(data, offset, shape))

    def add_sum(self, key: str, dtype: str, shape: tuple[int, ...], total: int) -> None:
        """Count the sum of some shards of a tensor."""
        self.tensors[key] = (dtype, shape, _wrap(total + self.tensors.get(key, (dtype, shape, 0))[2]))

    def hash(self) -> str:
        """The fingerprint of all that was counted."""
        return hash_json(self.tensors)


def _wrap(number: int) -> int:
    """``number`` modulo 2^64, as signed."""
    return (number + 2**63) % 2**64 - 2**63


def _shard_sum(data: torch.Tensor, offset: Sequence[int], shape: Sequence[int]) -> int:
    """Sum over a shard's elements of their mixtures of bits and global position, modulo 2^64."""
    data = data.detach()
    # a first axis of one element gives scalars a row as well
    offset, shape = (0, *offset), (1, *shape)
    local = (1,) * (len(shape) - data.dim()) + tuple(data.shape)
    bits, total = data.contiguous().view(BIT_TYPES[data.element_size()]).reshape(-1, max(1, local[-1])), 0
    height = max(1, BLOCK // max(1, local[-1]))
    for row in range(0, len(bits), height):
        for column in range(0, local[-1], BLOCK):
            block = bits[row : row + height, column : column + BLOCK].to(torch.int64)
            rows = torch.arange(row, row + block.shape[0], device=data.device)
            columns = torch.arange(column, column + block.shape[1], device=data.device) + offset[-1]
            position = _row_positions(rows, local, offset, shape)[:, None] * shape[-1] + columns
            block = block * MULTIPLIERS[0] + position * MULTIPLIERS[1]
            block = (block ^ (block >> 29)) * MULTIPLIERS[2]
            total = _wrap(total + int((block ^ (block >> 32)).sum()))
    return total


def _row_positions(rows: torch.Tensor, local: Sequence[int], offset: Sequence[int],
                   shape: Sequence[int]) -> torch.Tensor:
    """Global number of a shard's rows, all axes but the last taken as one; ``local`` is the shard's shape."""
    position, stride = torch.zeros_like(rows), 1
    for axis in range(len(shape) - 2, -1, -1):
        position += (rows % local[axis] + offset[axis]) * stride
        rows, stride = rows // local[axis], stride * shape[axis]
    return position
