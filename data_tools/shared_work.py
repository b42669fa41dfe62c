"""Blocks of a job shared by any number of processes, on one machine or on many, through files alone.

A process claims a block by a file that only one can create, and touches that file while it works. A claim of a dead
process of this machine, or one that nobody has touched for a minute, is taken over. Blocks are written atomically and
their bytes depend on nothing but the job, so two processes that do the same block do no harm.
"""

import contextlib
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Self

from megatron_m3.errors import ConfigError, M3Error
from megatron_m3.manifest import BlockFolder

STALE_SECONDS, BEAT_SECONDS = 60.0, 5.0
"""After how long without a touch a claim is taken over, and how often its holder touches it."""
POLL_SECONDS = 0.2
"""Between looks at what other processes have done."""
ME = f"{os.uname().nodename} {{pid}}"

type Do = Callable[[int], None]
"""Writes one block."""


class Claims:
    """Who works on which block of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "claims"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._seen: dict[Path, tuple[float, float]] = {}

    @contextlib.contextmanager
    def hold(self, index: int) -> Iterator[bool]:
        """Whether the block is ours for the length of the `with`."""
        path = self.folder / f"{index:06d}"
        if not self._create(path) and not (self._is_abandoned(path) and self._take_over(path)):
            yield False
            return
        stop = threading.Event()
        beat = threading.Thread(target=_touch, args=(path, stop), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            stop.set()
            beat.join()
            path.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        try:
            with path.open("x") as stream:
                stream.write(ME.format(pid=os.getpid()))
        except FileExistsError:
            return False
        return True

    def _is_abandoned(self, path: Path) -> bool:
        try:
            holder, touched, now = path.read_text(), path.stat().st_mtime, time.monotonic()
        except FileNotFoundError:
            return False
        host, _, pid = holder.rpartition(" ")
        if host == os.uname().nodename and (int(pid) == os.getpid() or not Path(f"/proc/{pid}").exists()):
            return True
        last, since = self._seen.setdefault(path, (touched, now))
        if last != touched:
            self._seen[path] = touched, now
        return last == touched and now - since > STALE_SECONDS

    def _take_over(self, path: Path) -> bool:
        aside = path.with_name(f".{path.name} {ME.format(pid=os.getpid())}")
        try:
            path.rename(aside)
        except FileNotFoundError:
            return False
        aside.unlink()
        return self._create(path)


def _touch(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)


def share(folder: BlockFolder, num_blocks: int, do: Do, stopped: Callable[[], bool] = lambda: False) -> Iterator[int]:
    """Do blocks until all are there, whoever wrote them; gives each block once, and -1 while it waits for others."""
    claims = Claims(folder.folder)
    start = zlib.crc32(ME.format(pid=os.getpid()).encode()) % max(1, num_blocks)
    left = dict.fromkeys([*range(start, num_blocks), *range(start)])
    while left and not stopped():
        waiting = True
        for index in tuple(left):
            if stopped():
                return
            if not folder.done(index):
                with claims.hold(index) as ours:
                    if not ours:
                        continue
                    if not folder.done(index):
                        do(index)
            waiting = False
            del left[index]
            yield index
        if waiting:
            yield -1
            time.sleep(POLL_SECONDS)
    with contextlib.suppress(OSError):
        claims.folder.rmdir()


class Workers:
    """``count`` processes of this machine that share blocks with each other and with every other job; a context."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ConfigError(f"workers={count}: must be at least 1")
        self.count = count

    def __enter__(self) -> Self:
        import multiprocessing

        self.pool: ProcessPoolExecutor | None = None
        if self.count > 1:
            context = multiprocessing.get_context("spawn")
            self.stop = context.Event()
            self.pool = ProcessPoolExecutor(self.count, context, _begin, (self.stop,))
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
                missing.discard(index)

    def _share(self, folder: BlockFolder, num_blocks: int, do: Do) -> Iterator[int]:
        if self.pool is None:
            yield from share(folder, num_blocks, do)
            return
        pending: set[Future[Any]] = {self.pool.submit(_work, folder, num_blocks, do) for _ in range(self.count)}
        left = set(range(num_blocks))
        try:
            while pending:
                finished, pending = wait(pending, timeout=POLL_SECONDS)
                for one in finished:
                    one.result()
                found = {index for index in left if folder.done(index)}
                left -= found
                yield from sorted(found) or [-1]
        except BrokenProcessPool:
            raise M3Error("workers: one was killed, perhaps for want of memory; run the same command again, with fewer "
                          "workers: it goes on from the missing blocks") from None


_stop: Any = None


def _begin(stop: Any) -> None:
    global _stop
    _stop = stop


def _work(folder: BlockFolder, num_blocks: int, do: Do) -> None:
    import multiprocessing

    parent = multiprocessing.parent_process()
    for _ in share(folder, num_blocks, do, lambda: _stop.is_set() or not (parent and parent.is_alive())):
        pass
