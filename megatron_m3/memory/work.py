"""The ranks of a build: groups that hold one model each, errors that all ranks learn of, and the blocks they take."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from megatron_m3.errors import ConfigError, M3Error, ToldError, user_message
from megatron_m3.manifest.claims import Claims
from megatron_m3.memory.bank import ShardFolder

POLL_SECONDS = 0.05
MOST_POLL_SECONDS = 1.0


@contextmanager
def agree(comm: Any) -> Iterator[None]:
    """Run a block on every rank; if a user's mistake stops any rank, all raise it. A collective at the block's end.

    Rank 0 raises the error itself, the others a :class:`ToldError`.
    """
    mine: M3Error | None = None
    try:
        yield
    except (M3Error, OSError) as error:
        message = user_message(error)
        if message is None:
            raise
        mine = error if isinstance(error, M3Error) else M3Error(message)
    messages = [found for found in comm.allgather(str(mine) if mine else None) if found is not None]
    if messages and comm.rank:
        raise ToldError(messages[0])
    if mine is not None and str(mine) == messages[0]:
        raise mine
    if messages:
        raise M3Error(messages[0])


class Crew:
    """The ranks of a job in groups of ``tensor`` consecutive ones; a group holds one model, its first rank leads it.

    The groups' processes must have joined a torch.distributed world each, if they are of more than one.
    """

    def __init__(self, comm: Any, tensor: int = 1) -> None:
        """Count the ranks.

        Raises:
            ConfigError: they do not make whole groups.
        """
        if comm.size % tensor:
            raise ConfigError(f"tensor_parallel={tensor}: {comm.size} ranks do not make groups of {tensor}; start a "
                              f"multiple of {tensor}, such as `mpiexec -n {tensor}`")
        self.comm, self.tensor, self.rank = comm, tensor, comm.rank
        self.group, self.num_groups = comm.rank // tensor, comm.size // tensor
        self.leads = comm.rank % tensor == 0
        self._world: Any = None

    def join(self) -> None:
        """Open the group's channel for :meth:`tell`, once its world is there."""
        if self.tensor > 1:
            import torch.distributed as dist

            self._world = dist.new_group(backend="gloo")

    def tell[Item](self, item: Item) -> Item:
        """What the group's first rank has, on all of them; each calls this."""
        if self._world is None:
            return item
        import torch.distributed as dist

        told = [item]
        dist.broadcast_object_list(told, src=0, group=self._world)
        return told[0]


class Run:
    """Whether a job goes on: a file that its first rank to fail removes (which a full disk allows).

    A context manager; an error of the user's that leaves it becomes a :class:`ToldError` where another rank failed
    before.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"{name}.run"
        self._path.touch()

    @staticmethod
    def clear(folder: Path) -> None:
        """Remove the files of all jobs: their bank is finished."""
        for path in folder.glob("*.run"):
            path.unlink(missing_ok=True)

    def goes_on(self) -> bool:
        """Whether no rank has failed, and the bank is not finished."""
        return self._path.exists()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, ToldError) or user_message(error) is None:
            return
        try:
            self._path.unlink()
        except FileNotFoundError:
            raise ToldError(str(error)) from None


class OpenBlocks:
    """The missing blocks of a bank, as this process gets hold of them."""

    def __init__(
        self, folder: ShardFolder, claims: Claims, run: Run, missing: Sequence[int], *, first: int = 0
    ) -> None:
        """``first`` is the place in ``missing`` at which this process begins; apart from others, they meet less."""
        self.folder, self.claims, self.run, self.missing = folder, claims, run, missing
        self._first = first

    def __iter__(self) -> Iterator[int | None]:
        """Blocks that this process has claimed; None now and then while others have all that are left.

        Ends when every block is written.

        Raises:
            ToldError: another rank of the job failed.
        """
        left, pause = [*self.missing[self._first :], *self.missing[: self._first]], POLL_SECONDS
        while left:
            for index in left:
                if self._take(index):
                    pause = POLL_SECONDS
                    yield index
            goes_on = self.run.goes_on()
            left = [index for index in left if not self.folder.done(index)]
            if left:
                self._check(goes_on)
                yield None
                time.sleep(pause)
                pause = min(2 * pause, MOST_POLL_SECONDS)

    def _take(self, index: int) -> bool:
        if self.folder.done(index) or not self.claims.take(self._name(index)):
            return False
        goes_on = self.run.goes_on()
        if self.folder.done(index):  # since we looked
            self.claims.release(self._name(index))
            return False
        self._check(goes_on)
        return True

    @staticmethod
    def _check(goes_on: bool) -> None:
        if not goes_on:
            raise ToldError("another rank failed")

    def write(self, index: int, shard: bytearray) -> None:
        """Write a block that this process took, unless another did so meanwhile."""
        name = self._name(index)
        try:
            if self.claims.holds(name):
                self.folder.write_bytes(index, shard)
        except FileNotFoundError:  # another took over, and cleared away what looked left behind
            if not self.folder.done(index):
                raise
        finally:
            self.claims.release(name)

    def _name(self, index: int) -> str:
        return Path(self.folder.name(index)).stem
