"""Reading records in bulk: in the order in which they lie, neighbours together, in parallel threads, checked."""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from megatron_m3.memory.record import RecordLayout
from megatron_m3.memory.storage import Storage

Place = tuple[str, int]
"""A file and the byte in it at which a record begins."""
TASK_BYTES = 1 << 18
"""Bytes of records that a thread reads and checks before it hands them over, about."""
READ_BYTES = 1 << 20
"""Most bytes of one read, about."""
BUFFERS = 512
"""Most buffers of one read; systems allow 1,024."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which part of which records."""

    places: Sequence[Place]
    """Of the records; they are read in ascending order, wherever they stand here."""
    layout: RecordLayout
    """Of the wanted part of a record."""
    pieces: Sequence[slice]
    """The bytes of a record that make it up."""

    def some(self, rows: Sequence[int]) -> "Wanted":
        """Some of the records."""
        return replace(self, places=[self.places[row] for row in rows])


class RecordReader:
    """Reads records from a storage with a bounded number of threads."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.storage.threads, thread_name_prefix="read")

    def read(self, wanted: Wanted, rows: np.ndarray) -> Iterator[tuple[list[int], list[int]]]:
        """Fill ``rows`` with the records; yields numbers of rows that are there, while others are still read.

        With them come those of them whose checksums do not fit.

        Raises:
            ArtifactError: a file is missing or cut short.
        """
        def work(part: list[int]) -> tuple[list[int], list[int]]:
            for name, offset, buffers in _plan(wanted, rows, part, self.storage.gap):
                self.storage.read(name, offset, buffers)
            return part, wanted.layout.damaged_rows(rows, part)

        order = sorted(range(len(rows)), key=wanted.places.__getitem__)
        tasks = [order[part] for part in self._tasks(len(rows), rows.shape[1])]
        if len(tasks) == 1:
            yield work(tasks[0])
        else:
            futures = [self._pool.submit(work, task) for task in tasks]
            try:
                for future in futures:
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()

    def _tasks(self, count: int, size: int) -> list[slice]:
        threads = max(1, min(self.storage.threads, count // self.storage.records))
        length = max(1, min(-(-count // threads), max(self.storage.records, TASK_BYTES // size)))
        return [slice(first, min(first + length, count)) for first in range(0, count, length)]


def _plan(wanted: Wanted, rows: np.ndarray, part: list[int], gap: int) -> Iterator[tuple[str, int, list[np.ndarray]]]:
    """The reads that fill some rows: file, offset, and the buffers that follow each other there."""
    name, start, end, buffers = "", 0, 0, list[np.ndarray]()
    for row in part:
        file, offset = wanted.places[row]
        filled = 0
        for piece in wanted.pieces:
            first, length = offset + piece.start, piece.stop - piece.start
            joins = file == name and 0 <= first - end <= gap and first - start < READ_BYTES and len(buffers) < BUFFERS
            if not joins:
                if buffers:
                    yield name, start, buffers
                name, start, end, buffers = file, first, first, []
            if first > end:
                buffers.append(np.empty(first - end, np.uint8))
            buffers.append(rows[row, filled : filled + length])
            filled, end = filled + length, first + length
    if buffers:
        yield name, start, buffers
