"""Work beside a computation: reading ahead of it and writing behind it, each in a thread and a bounded queue."""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Self

AT_A_TIME = 0.1
"""Seconds after which a waiting thread looks whether it is still wanted."""


class _End:
    """The last thing in a queue, and the error that ended the work, if one did."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def read_ahead[Item](items: Iterable[Item], depth: int) -> Generator[Item]:
    """``items``, made in another thread up to ``depth`` ahead of their use; its errors come out here.

    The thread ends between two items when the iterator is closed.
    """
    ready: queue.Queue[Item | _End] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: Item | _End) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=AT_A_TIME)
                break

    def read() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                put(item)
                if closed.is_set():
                    break
        except BaseException as caught:
            error = caught
        put(_End(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        closed.set()
        thread.join()


class Behind[Item]:
    """Does ``work`` with one item after another in another thread, up to ``depth`` of them behind the caller.

    A context manager: leaving it waits until all is done. An error of the work ends it, and is raised at the next use.
    """

    def __init__(self, work: Callable[[Item], None], depth: int) -> None:
        self._work = work
        self._waiting: queue.Queue[Item | _End] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._dropped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def put(self, item: Item) -> None:
        """Hand over an item; waits while ``depth`` others wait."""
        self.check()
        self._waiting.put(item)

    def check(self) -> None:
        """Raise the error that ended the work, if one did."""
        if self._error is not None:
            raise self._error

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._dropped.set()
        self._waiting.put(_End())
        self._thread.join()
        if kind is None:
            self.check()

    def _run(self) -> None:
        while not isinstance(item := self._waiting.get(), _End):
            if self._dropped.is_set():
                continue
            try:
                self._work(item)
            except BaseException as error:
                self._error = error
                self._dropped.set()
