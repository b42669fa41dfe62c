"""Processes: joining the world, and its tensor-, pipeline- and data-parallel groups."""

import atexit
import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_m3.errors import ConfigError, M3Error
from megatron_m3.platform.platform import Platform, select

TIMEOUT = datetime.timedelta(minutes=30)


class ParallelSizes(Protocol):
    """Model-parallel sizes, such as the parallel section of a config."""

    @property
    def tensor(self) -> int:
        """Tensor-parallel processes."""

    @property
    def pipeline(self) -> int:
        """Pipeline stages."""

    @property
    def interleave(self) -> int:
        """Model chunks of a pipeline stage."""


def _join_world(platform: Platform) -> None:
    """Join the world a launcher describes in the environment, or make a world of this one process."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(platform.backend, timeout=TIMEOUT)
        return
    dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    # NCCL warns of a world that is left to the end of its process
    atexit.register(shut_down)


def join_store(rank: int, size: int, host: str, share: Callable[[int], int]) -> None:
    """Join a world of ``size`` processes that can already talk to each other.

    Args:
        rank: of this process.
        size: processes of the world.
        host: address of the process of rank 0, by which all others reach it.
        share: gives every process what rank 0 passes to it; the others pass 0.
    """
    store = dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = share(store.port if store is not None else 0)
    if store is None:
        store = dist.TCPStore(host, port, size, is_master=False)
    # what splits the model looks here for the size of the world
    os.environ["WORLD_SIZE"] = str(size)
    dist.init_process_group(select().backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def check_world_size(parallel: ParallelSizes, world_size: int) -> None:
    """Refuse a world that the model-parallel sizes do not divide."""
    model_parallel = parallel.tensor * parallel.pipeline
    if world_size % model_parallel:
        raise ConfigError(
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} needs a multiple of "
            f"{model_parallel} processes, there are {world_size}; start that many, e.g. "
            f"`torchrun --nproc-per-node {model_parallel}`"
        )


def initialize_parallel(parallel: ParallelSizes, seed: int) -> Platform:
    """Join the world and build megatron-core's process groups; call :func:`shut_down` at the end.

    Under a launcher the environment's RANK, WORLD_SIZE and MASTER_ADDR are used; alone, the world is one process.

    Raises:
        ConfigError: the parallel sizes do not divide the number of processes; nothing has been joined then.
    """
    platform = select()
    check_world_size(parallel, int(os.environ.get("WORLD_SIZE", "1")))
    from megatron.core import parallel_state, tensor_parallel

    if not dist.is_initialized():
        _join_world(platform)
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.interleave if parallel.interleave > 1 else None,
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return platform


def shut_down() -> None:
    """Leave the process groups and the world."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def on_first_process(action: Callable[[], None]) -> None:
    """Run ``action`` on the first process; a collective.

    Raises:
        M3Error, OSError: what stopped it, on all processes.
    """
    failure: list[M3Error | OSError | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except (M3Error, OSError) as error:
            failure = [error]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


@contextmanager
def parallel_world(parallel: ParallelSizes, seed: int) -> Iterator[Platform]:
    """:func:`initialize_parallel` for the length of a block."""
    try:
        yield initialize_parallel(parallel, seed)
    finally:
        shut_down()
