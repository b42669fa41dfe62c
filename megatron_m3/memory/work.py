"""Work shared by MPI ranks: a counter of items, a count of what is done, and errors that all ranks learn of.

The counters live in rank 0's memory and are reached by one-sided operations, so no rank waits for another.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np

from megatron_m3.errors import M3Error, user_message

POLL_SECONDS = 0.05
NEXT, DONE = 0, 1


@contextmanager
def agree(comm: Any) -> Iterator[None]:
    """Run a block on every rank; if a user's mistake stops any rank, all raise it. A collective at the block's end."""
    mine: M3Error | None = None
    try:
        yield
    except (M3Error, OSError) as error:
        message = user_message(error)
        if message is None:
            raise
        mine = error if isinstance(error, M3Error) else M3Error(message)
    messages = [found for found in comm.allgather(str(mine) if mine else None) if found is not None]
    if mine is not None and str(mine) == messages[0]:
        raise mine
    if messages:
        raise M3Error(messages[0])


class SharedWork:
    """``count`` items, each taken by one rank; a context manager that all ranks enter and leave together."""

    def __init__(self, comm: Any, count: int) -> None:
        self.comm, self.count = comm, count

    def __enter__(self) -> Self:
        from mpi4py import MPI

        self.shared = MPI.LOCK_SHARED
        self.sum = MPI.SUM
        self.window = MPI.Win.Allocate(16 if self.comm.rank == 0 else 0, 8, comm=self.comm)
        if self.comm.rank == 0:
            np.frombuffer(self.window.tomemory(), np.int64)[:] = 0
        self.comm.Barrier()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        # an error that is ours alone ends the process; the others would never come to free the counters
        if kind is None or issubclass(kind, M3Error):
            self.window.Free()

    def _add(self, counter: int, amount: int) -> int:
        """Add to a counter; return what it held before."""
        amounts, before = np.array([amount], np.int64), np.zeros(1, np.int64)
        self.window.Lock(0, self.shared)
        self.window.Fetch_and_op(amounts, before, 0, counter, self.sum)
        self.window.Unlock(0)
        return int(before[0])

    def run(self, do: Callable[[int], None], shown: Callable[[], None]) -> None:
        """Do items until all are taken, then wait for the other ranks; if one fails, none takes another item.

        ``shown`` is called now and then while waiting.

        Raises:
            M3Error: on all ranks, where one met it.
        """
        with agree(self.comm):
            try:
                while (item := self._add(NEXT, 1)) < self.count:
                    do(item)
            except BaseException:
                self._add(NEXT, self.count)
                raise
            finally:
                self._wait(shown)

    def _wait(self, shown: Callable[[], None]) -> None:
        request = self.comm.Ibarrier()
        while not request.Test():
            shown()
            time.sleep(POLL_SECONDS)

    def add_done(self, amount: int) -> None:
        """Count what is done."""
        self._add(DONE, amount)

    def done(self) -> int:
        """What all ranks have done."""
        return self._add(DONE, 0)
