"""Files of a checkpoint, written and checked by all processes together: they succeed together or fail together."""

import itertools
import logging
import queue
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_m3.errors import ArtifactError
from megatron_m3.manifest import Manifest, hash_file


def write_shards(sharded: dict[str, Any], folder: Path) -> None:
    """Write what ``sharded`` describes with dist_checkpointing; if a disk refuses, all processes raise OSError."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint.api import CheckpointException

    # Saving is synchronous, so results need no queue between processes; the one that megatron-core would start is
    # a process of its own, which the signals that mean "save and leave" kill.
    filesystem_async._results_queue = queue.Queue()
    # what it logs of a failed write is raised as well
    filesystem_async.logger.setLevel(logging.CRITICAL)
    try:
        dist_checkpointing.save(sharded, str(folder))
    except (CheckpointException, OSError) as error:
        raise OSError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """The disk's own words, from wherever they are in the report of dist_checkpointing."""
    found = re.search(r"\[Errno \d+\] ([^:'\"\n]+)", str(error))
    # torch's zip writer notices a short write only by its position
    return found[1] if found else "a write was cut short"


def check_checksums(folder: Path, manifest: Manifest, wanted: Callable[[str], bool]) -> None:
    """Check the checksums of the files whose name is ``wanted``, shared out over the processes; all raise alike.

    Raises:
        ArtifactError: names a damaged file.
    """
    names = sorted(filter(wanted, manifest.files))[dist.get_rank() :: dist.get_world_size()]
    damaged: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(damaged, [name for name in names if hash_file(folder / name) != manifest.files[name]])
    for name in itertools.chain.from_iterable(damaged):
        raise ArtifactError(f"{folder / name}: checksum differs from the manifest; take another checkpoint")


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of each file, shared out over the processes."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    mine = {name: hash_file(folder / name) for name in names[dist.get_rank() :: dist.get_world_size()]}
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {name: record for part in parts for name, record in part.items()}


def global_bytes(sharded: dict[str, Any]) -> int:
    """Bytes that all processes together will write."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

    mine = sum(
        shard.data.numel() * shard.data.element_size()
        for shard in nested_values(sharded)
        if isinstance(shard, ShardedTensor | ShardedTensorFactory) and is_main_replica(shard.replica_id)
    )
    total: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(total, mine)
    return sum(total)
