"""Records on a local disk: of a bank that is far away, or memories that were never in a bank.

A folder for each bank holds its files under their own names, with the records that were kept at their own places and
holes elsewhere: when all records are there, the files are those of the bank. A record that is not there, or was
half-written, does not fit its checksums. So any number of processes may read and write at the same time.
"""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_m3.errors import ConfigError
from megatron_m3.memory.reader import RecordReader, Wanted

BYTES = 1 << 34
"""Default budget."""
SHARE = 16
"""A process looks what is on the disk again after it wrote this part of the budget."""
BLOCK = 4096
"""Bytes that a disk takes up at a time."""
IDENTITY = re.compile("[0-9a-f]{64}")
"""Folders that are a mirror's; others are never touched."""


class Mirror:
    """Some records of one bank in a local folder; whole files go, the longest unused first, when they are over budget,
    or the disk is full.

    The budget is for all banks in the folder, in bytes that their files take up on disk. Processes that write at the
    same time may each go over it by a 16th.
    """

    def __init__(self, folder: Path, identity: str, budget_bytes: int = BYTES) -> None:
        """``identity`` is the hash of the bank, by which its records are found again.

        Raises:
            ConfigError: the folder cannot be written.
        """
        self.root, self.folder, self.budget_bytes = folder, folder / identity, budget_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder}: {error.strerror}; give another folder for records") from None
        self._reader, self._room = RecordReader(_SparseFiles(self.folder)), 0

    def read(self, wanted: Wanted, rows: np.ndarray) -> list[int]:
        """Fill ``rows`` with the records that are here; the numbers of the others."""
        return [row for _, missing in self._reader.read(wanted, rows) for row in missing]

    def write(self, wanted: Wanted, rows: np.ndarray) -> None:
        """Keep records, which fit their checksums; nothing if there is no room for them."""
        size = len(rows) * sum(piece.stop - piece.start + 2 * BLOCK for piece in wanted.pieces)
        if size > self.budget_bytes:
            return
        if size > self._room:
            self._room = self._make_room(size)
            if size > self._room:
                return
        self._room -= size
        for (name, offset), row in zip(wanted.places, rows, strict=True):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                filled = 0
                for piece in wanted.pieces:
                    length = piece.stop - piece.start
                    os.pwrite(file, row[filled : filled + length], offset + piece.start)
                    filled += length
            except OSError as error:
                error.filename = str(path)
                raise
            finally:
                os.close(file)

    def _make_room(self, size: int) -> int:
        """Remove files until ``size`` bytes fit, or a share of the budget if that is more; the room that there is."""
        kept = (path for bank in self.root.iterdir() if IDENTITY.fullmatch(bank.name) for path in bank.rglob("*.bin"))
        files, disk = sorted(filter(None, map(_use, kept)), reverse=True), shutil.disk_usage(self.root)
        wanted, free = max(size, self.budget_bytes // SHARE), self.budget_bytes - sum(taken for _, taken, _ in files)
        if disk.total:
            free = min(free, disk.free)
        while files and free < wanted:
            _, taken, path = files.pop()
            path.unlink(missing_ok=True)
            free += taken
        return min(free, wanted)


def _use(path: Path) -> tuple[int, int, Path] | None:
    """When a file was last used, what it takes up, and the file; None if another process has just removed it."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_mtime_ns, state.st_blocks * 512, path


class _SparseFiles:
    """Files that may be missing or short: what they do not hold is 0. Reading one marks it as used."""

    threads, records, gap = 4, 16, 0

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str, offset: int, buffers: Sequence[np.ndarray]) -> None:
        """See :class:`megatron_m3.memory.storage.Storage`."""
        for buffer in buffers:
            buffer[:] = 0
        try:
            file = os.open(self.folder / name, os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            os.preadv(file, buffers, offset)
            os.utime(file)
        finally:
            os.close(file)
