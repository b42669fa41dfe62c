"""`m3 bank build`: write the memory bank of a checkpoint, alone or under MPI.

    m3 bank build --checkpoint run --references references --output bank
    mpiexec -n 8 python -m launch.build_bank --checkpoint run --references references --output bank --codec auto
    mpiexec -n 8 python -m launch.build_bank --checkpoint run --references references --output bank --tensor-parallel 2
    mpiexec -n 8 python -m launch.build_bank --checkpoint run --references references --output bank --plan

A build that was stopped goes on where it was when the same command is given again; given several times at once, the
jobs share the work. It does not begin where the disk has less space than is still to be written; --plan says how much
that is, and how long it will take.
"""

import functools
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_m3.config import parse
from megatron_m3.config.bank import BankConfig
from megatron_m3.errors import M3Error, ToldError, UnsupportedError, exit_on_user_error, user_message

if TYPE_CHECKING:
    from megatron_m3.model.checkpoint import LoadedModel

FOR_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
LAUNCHER = ("RANK", "WORLD_SIZE")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, build together with the other ranks, and print a line about the bank; errors are told by one rank."""
    run_on_ranks(lambda: parse(BankConfig, argv, "m3 bank build", __doc__ or ""), _build)


def run_on_ranks[Options](read: Callable[[], Options], do: Callable[[Options, Any], str | None]) -> None:
    """Read the options, do the job together with the other ranks, and print what it returns; one rank tells errors."""
    for name in FOR_ONE_THREAD:  # sums depend on the number of threads; parallelism is the ranks' business
        os.environ[name] = "1"
    wrong: M3Error | None = None
    try:
        options = read()
    except M3Error as error:
        wrong = error
    comm = _world()
    rank = comm.rank
    try:
        if wrong is not None:
            raise wrong if rank == 0 else ToldError(str(wrong))
        line = do(options, comm)
    except ToldError:
        sys.exit(2)
    except BaseException as error:
        if user_message(error) is None:
            _give_up(comm)
        raise
    if line:
        print(line)


def _give_up(comm: Any) -> None:
    """End the process by an error of ours, and with it the ranks that still talk to it."""
    from mpi4py import MPI

    traceback.print_exc()
    if not MPI.Is_finalized():
        comm.Abort(1)
    os._exit(1)  # other threads may still be at work


def _world() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedError(f"mpi4py: no MPI library ({reason}); install requirements.txt") from None
    return MPI.COMM_WORLD


def settle(comm: Any) -> int:
    """Choose this rank's device, one thread, and no world of torch.distributed yet.

    Returns:
        Ranks on its machine.
    """
    import torch
    from mpi4py import MPI

    torch.set_num_threads(1)
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    os.environ["LOCAL_RANK"] = str(local.rank % max(1, torch.cuda.device_count()))
    for name in LAUNCHER:  # a rank, or a group of ranks, is a world of its own to torch.distributed
        os.environ.pop(name, None)
    from megatron_m3.platform import select

    select()
    return int(local.size)


def _build(options: BankConfig, comm: Any) -> str | None:
    import torch.distributed as dist
    from mpi4py import MPI

    num_local = settle(comm)
    from megatron_m3.memory.build import build_bank
    from megatron_m3.platform.distributed import shut_down

    if options.plan:
        return _plan(options, comm)
    had_world = dist.is_initialized()
    if options.tensor_parallel > 1:
        _join_group(comm, options.tensor_parallel, is_one_machine=num_local == comm.size)
    line = build_bank(options, comm, functools.partial(load_alone, tensor=options.tensor_parallel),
                      begun=MPI.Finalize if comm.size > 1 else lambda: None)
    if not had_world:
        shut_down()
    return line


def _join_group(comm: Any, size: int, *, is_one_machine: bool) -> None:
    """Make a world of torch.distributed of each ``size`` consecutive ranks."""
    from megatron_m3.memory.work import Crew
    from megatron_m3.platform.distributed import join_store

    Crew(comm, size)  # refuses what makes no whole groups
    group = comm.Split(comm.rank // size)
    host = "127.0.0.1" if is_one_machine else socket.gethostname()
    join_store(group.rank, size, host, group.bcast)


def _plan(options: BankConfig, comm: Any) -> str | None:
    """The plan as text or JSON on rank 0."""
    from megatron_m3.evaluation.bank_plan import plan_build, plan_table
    from megatron_m3.memory.bank_order import BankOrder
    from megatron_m3.memory.work import agree
    from megatron_m3.model.checkpoint import describe_model
    from megatron_m3.model.gpt import DTYPES
    from megatron_m3.platform import select
    from megatron_m3.training.metrics import measure_peak_tflops

    with agree(comm):
        order = BankOrder.open(options, describe_model)
    mine = options.plan_tflops or measure_peak_tflops(select().device, DTYPES[order.loaded.config.training.dtype])
    rates, line = comm.gather(mine), None
    with agree(comm):
        if comm.rank == 0:
            plan = plan_build(order, rates, select().device)
            line = json.dumps(asdict(plan), indent=2) if options.json else plan_table(plan)
    return line


def load_alone(folder: Path, tensor: int = 1) -> "LoadedModel":
    """Read a checkpoint into this process, or its group of ``tensor`` processes."""
    from megatron_m3.model.checkpoint import load_model

    return load_model(folder, tensor=tensor)


if __name__ == "__main__":
    exit_on_user_error(main)
