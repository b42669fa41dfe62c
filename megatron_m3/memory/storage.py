"""Where the files of a bank lie, and reading bytes at a place in one of them."""

import functools
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_m3.errors import ArtifactError

OPEN_FILES = 256
"""Most files open at a time."""


class Storage(Protocol):
    """Reads parts of named files; never writes. Safe to use from several threads."""

    threads: int
    """Reads that it serves best at the same time."""
    records: int
    """Fewest records that are worth a thread."""
    gap: int
    """Bytes between two wanted places that are read along rather than asking twice."""

    def read(self, name: str, offset: int, buffers: Sequence[np.ndarray]) -> None:
        """Fill ``buffers``, one after another, with the bytes of file ``name`` from ``offset`` on.

        Raises:
            ArtifactError: the file is missing or ends before.
        """


class LocalStorage:
    """A folder; every read is one positional read."""

    threads, records, gap = 8, 4, 0

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = functools.lru_cache(OPEN_FILES)(lambda name: _File(self.folder / name))

    def read(self, name: str, offset: int, buffers: Sequence[np.ndarray]) -> None:
        """See :class:`Storage`."""
        self._open(name).read(buffers, offset)


class _File:
    """One open file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise ArtifactError(f"{path}: {error.strerror}; build the bank again") from None

    def read(self, buffers: Sequence[np.ndarray], offset: int) -> None:
        wanted = sum(map(operator.attrgetter("nbytes"), buffers))
        if os.preadv(self.descriptor, buffers, offset) != wanted:
            raise ArtifactError(f"{self.path}: cut short; run `m3 bank build` into the folder again")

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
