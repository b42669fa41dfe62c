"""Blocks of a job shared by any number of processes, on one machine or on many, through claims in the job's folder.

Blocks are written atomically and their bytes depend on nothing but the job, so two processes that do the same block,
as when the first was only slow, do no harm.
"""

import contextlib
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol, Self

from megatron_m3.errors import ArtifactError, ConfigError, M3Error
from megatron_m3.manifest import BlockFolder, is_finished, tell_kept
from megatron_m3.manifest.claims import CLAIMS, Claims

POLL_SECONDS = 0.2
"""Between looks at what other processes have done, at least."""
LOOK_SHARE = 0.05
"""Of the time that looking may take while workers work."""
STAGES = "stages"
"""Folder in the output of what a job needs until its end."""
type Do = Callable[[int], None]
"""Writes one block."""


class Pieces(Protocol):
    """What is shared: numbered pieces of work, of which a folder shows which are done."""

    folder: Path

    def done(self, index: int) -> bool:
        """Whether piece ``index`` is done."""
        ...


def share(folder: Pieces, num_blocks: int, do: Do, stopped: Callable[[], bool] = lambda: False) -> Iterator[int]:
    """Do blocks until all are there, whoever wrote them; gives each block once, and -1 while it waits for others."""
    with Claims(folder.folder / CLAIMS) as claims:
        start = zlib.crc32(claims.owner.encode()) % max(1, num_blocks)
        left = dict.fromkeys([*range(start, num_blocks), *range(start)])
        while left and not stopped():
            waiting = True
            for index in tuple(left):
                if stopped():
                    return
                if folder.done(index) or _do(folder, claims, index, do):
                    waiting = False
                    del left[index]
                    yield index
            if waiting:
                yield -1
                time.sleep(POLL_SECONDS)
        claims.clear()


def _do(folder: Pieces, claims: Claims, index: int, do: Do) -> bool:
    """Write a block, unless it is there since we looked; false where another process has it."""
    if not claims.take(str(index)):
        return False
    try:
        if not folder.done(index):
            do(index)
    except FileNotFoundError:
        if not folder.done(index):  # by another, that thought this process dead, and has cleared up
            raise
    finally:
        claims.release(str(index))
    return True


def is_made(output: Path, kind: str, schema: int, inputs: dict[str, str], settings: dict[str, Any]) -> bool:
    """:func:`is_finished`; whoever made it may have been killed before it cleared the stages."""
    made = is_finished(output, kind, schema, inputs, settings)
    if made:
        shutil.rmtree(output / STAGES, ignore_errors=True)
    return made


@contextlib.contextmanager
def stages(folder: Path, is_made: Callable[[], bool]) -> Iterator[None]:
    """The length of a job that keeps in ``folder`` what it needs meanwhile: removed by the first process to end it.

    The others find it gone; that is no error where ``is_made`` says that the output is there.
    """
    try:
        yield
    except (ArtifactError, FileNotFoundError):
        if not is_made():
            raise
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def clear_refused(output: Path, refusal: type[M3Error] = ConfigError) -> Iterator[None]:
    """The length of a job that may find that it cannot be done: then ``output`` goes with the last process in it."""
    try:
        yield
    except refusal:
        if not any(_is_shared(Path(folder)) for folder, *_ in os.walk(output) if folder.endswith(CLAIMS)):
            shutil.rmtree(output, ignore_errors=True)
        raise


def _is_shared(folder: Path) -> bool:
    """Whether living processes share work by these claims."""
    with Claims(folder) as claims:
        claims.clear()
    return folder.exists()


class Workers:
    """``count`` processes of this machine that share blocks with each other and with every other job; a context."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> Self:
        import multiprocessing

        self.pool: ProcessPoolExecutor | None = None
        if self.count > 1:
            context = multiprocessing.get_context("spawn")
            self.stop = context.Event()
            begin = (self.stop, context.Value("i", 0))
            self.pool = ProcessPoolExecutor(self.count, context, _begin, begin)
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.stop.set()
            self.pool.shutdown(cancel_futures=True)

    def run(self, label: str, folder: BlockFolder, sizes: Sequence[int], unit: str, do: Do) -> None:
        """Have every block of ``folder`` written by ``do``, with progress on stderr.

        Args:
            label: what is done.
            folder: of the blocks; each has ``sizes`` of ``unit`` in it.
            sizes: of the blocks.
            unit: what they count.
            do: writes the block of a number; it can be pickled.

        Raises:
            M3Error: as ``do`` does, or because a worker was killed.
        """
        from megatron_m3.platform.progress import Progress

        missing = set(folder.missing(len(sizes)))
        with Progress(label, sum(sizes[index] for index in missing), unit) as progress:
            for index in self._share(folder, len(sizes), do):
                progress.advance(sizes[index] if index in missing else 0)
                if index in missing:
                    tell_kept()  # whoever wrote it: a job that waits for others is not at a standstill
                missing.discard(index)
        folder.clear_half_written(len(sizes))

    def _share(self, folder: BlockFolder, num_blocks: int, do: Do) -> Iterator[int]:
        if self.pool is None:
            yield from share(folder, num_blocks, do)
            return
        pending: set[Future[Any]] = {self.pool.submit(_work, folder, num_blocks, do) for _ in range(self.count)}
        left, pause = set(range(num_blocks)), POLL_SECONDS
        try:
            while pending:
                finished, pending = wait(pending, timeout=pause)
                for one in finished:
                    one.result()
                start = time.monotonic()
                found = {index for index in left if folder.done(index)}
                pause = max(POLL_SECONDS, (time.monotonic() - start) / LOOK_SHARE)
                left -= found
                yield from sorted(found) or [-1]
        except BrokenProcessPool:
            raise M3Error("workers: one was killed, perhaps for want of memory; run the same command again, with fewer "
                          "workers: it goes on from the missing blocks") from None


_stop: Any = None
_number: int | None = None
"""Which of the processes of :class:`Workers` this is, from 0; None for the job's own."""


def take_gpu() -> None:
    """Have this worker compute on the GPU of its number, where there are GPUs; further workers share them in turn."""
    from megatron_m3.platform import count_gpus

    if _number is not None and (gpus := count_gpus()):
        os.environ["LOCAL_RANK"] = str(_number % gpus)


def _begin(stop: Any, begun: Any) -> None:
    global _stop, _number
    os.environ["OMP_NUM_THREADS"] = "1"  # for what is imported from here on
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _stop = stop
    with begun.get_lock():
        _number = begun.value
        begun.value += 1


def _work(folder: BlockFolder, num_blocks: int, do: Do) -> None:
    import multiprocessing

    parent = multiprocessing.parent_process()
    for _ in share(folder, num_blocks, do, lambda: _stop.is_set() or not (parent and parent.is_alive())):
        pass
