"""Who tells of an error: the first process, unless another one alone meets it."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_m3.errors import M3Error, user_message

PATIENCE = 10.0
"""Seconds in which a launcher ends the other processes when the first one has failed."""


@contextmanager
def lone_errors_told() -> Iterator[None]:
    """Leave a user's error to the first process; on others wait, and tell it only if nobody ends this process.

    An error that all processes meet is thus one line: the first one tells it and leaves, and the launcher (torchrun,
    or srun with --kill-on-bad-exit) ends those that wait. Where the first one goes on, nobody is ended, and the process
    that met the error tells it with its rank. It must be used inside the world, since leaving the world fails the
    others.
    """
    try:
        yield
    except (M3Error, OSError) as error:
        rank, message = os.environ.get("RANK", "0"), user_message(error)
        if rank == "0" or message is None:
            raise
        if not getattr(error, "met_by_one_process", False):
            time.sleep(PATIENCE)
        print(f"rank {rank}: error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
