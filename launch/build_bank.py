"""`m3 bank build`: write the memory bank of a checkpoint, alone or under MPI.

    m3 bank build --checkpoint run --references references --output bank
    mpiexec -n 8 python -m launch.build_bank --checkpoint run --references references --output bank --codec auto
    mpiexec -n 8 python -m launch.build_bank --checkpoint run --references references --output bank --plan

A build that was stopped goes on where it was when the same command is given again. It does not begin where the disk has
less space than is still to be written; --plan says how much that is, and how long it will take.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_m3.config import parse
from megatron_m3.config.bank import BankConfig
from megatron_m3.errors import M3Error, UnsupportedError, exit_on_user_error

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
    try:
        if wrong is not None:
            raise wrong
        line = do(options, comm)
    except M3Error:
        if comm.rank == 0:
            raise
        sys.exit(2)
    except BaseException:
        traceback.print_exc()
        comm.Abort(1)
    if line:
        print(line)


def _world() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedError(f"mpi4py: no MPI library ({reason}); install requirements.txt") from None
    return MPI.COMM_WORLD


def settle(comm: Any) -> None:
    """Choose this rank's device, and let it be a world of its own to torch.distributed, on one thread."""
    import torch
    from mpi4py import MPI

    torch.set_num_threads(1)
    local_rank = comm.Split_type(MPI.COMM_TYPE_SHARED).rank
    os.environ["LOCAL_RANK"] = str(local_rank % max(1, torch.cuda.device_count()))
    for name in LAUNCHER:  # each rank is a world of its own to torch.distributed
        os.environ.pop(name, None)
    from megatron_m3.platform import select

    select()


def _build(options: BankConfig, comm: Any) -> str | None:
    import torch.distributed as dist

    settle(comm)
    from megatron_m3.memory.build import build_bank
    from megatron_m3.platform.distributed import shut_down

    if options.plan:
        return _plan(options, comm)
    had_world = dist.is_initialized()
    line = build_bank(options, comm, load_alone)
    if not had_world:
        shut_down()
    return line


def _plan(options: BankConfig, comm: Any) -> str | None:
    """The plan as text or JSON on rank 0."""
    from megatron_m3.evaluation.bank_plan import plan_build, plan_table
    from megatron_m3.memory.build import BankOrder
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
            plan = plan_build(order, rates)
            line = json.dumps(asdict(plan), indent=2) if options.json else plan_table(plan)
    return line


def load_alone(folder: Path) -> "LoadedModel":
    """Read a checkpoint into this process."""
    from megatron_m3.model.checkpoint import load_model

    return load_model(folder)


if __name__ == "__main__":
    exit_on_user_error(main)
