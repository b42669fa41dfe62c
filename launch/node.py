"""One node of a training job under Slurm: torchrun's agent, started by srun on each with `m3 pretrain`'s options.

The agents meet at M3_RENDEZVOUS (host:port). A node that the run cannot use, since the processes of all would not
divide its batch, leaves at once. SIGUSR1 and SIGTERM are passed on as SIGUSR1, at which the training saves and leaves;
before it has begun the agent leaves at once.
The exit status is that of the process that failed first, so that a user's mistake can be told from a crash.
"""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from launch.pretrain import parse_config
from megatron_m3.errors import ConfigError, exit_on_user_error
from megatron_m3.training.checks import largest_world

ASKED_TO_LEAVE = (signal.SIGUSR1, signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> None:
    """Join the other nodes' agents and train, or leave if this node is one too many."""
    words = list(sys.argv[1:] if argv is None else argv)
    place, available = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_STEP_NUM_NODES"])
    processes = int(os.environ["M3_PROCESSES_PER_NODE"])
    try:
        num_nodes = largest_world(parse_config(words), available, processes)
    except ConfigError:
        if place == 0:
            raise
        sys.exit(2)
    if place == 0:
        unused = f" of {available}" if available > num_nodes else ""
        print(f"training on {num_nodes}{unused} nodes, {processes} processes each", file=sys.stderr, flush=True)
    if place < num_nodes:
        sys.exit(_run_agent(num_nodes, processes, words))


def _run_agent(num_nodes: int, processes: int, words: list[str]) -> int:
    """Exit status of the training's processes on this node."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for number in ASKED_TO_LEAVE:
        signal.signal(number, _pass_on)
    try:
        run.main([
            "--nnodes", str(num_nodes), "--nproc-per-node", str(processes), "--rdzv-backend", "c10d",
            "--rdzv-endpoint", os.environ["M3_RENDEZVOUS"],
            "--rdzv-id", f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}",
            "--signals-to-handle", "SIGINT", "-m", "launch.pretrain", *words,
        ])
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return 128 - status if status < 0 else status
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    import psutil

    children = psutil.Process().children()
    for child in children:
        child.send_signal(signal.SIGUSR1)
    if not children:
        sys.exit(128 + number)


if __name__ == "__main__":
    exit_on_user_error(main)
