"""The lock of a folder: one writer at a time, known by name, and gone when its process is.

It is a file that gets its name only where none has it, so that it works on network file systems too. Its owner writes a
new time of expiry into it now and then, through the descriptor that created it: an owner that slept past its time and
whose lock was taken can no longer touch the new one.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_m3.errors import ArtifactError
from megatron_m3.manifest.process import is_running, machine

NAME = "lock.json"
LEASE_SECONDS = 90.0
"""After this long without a sign of life a lock is free; hosts' clocks must agree better than that."""
SIGNS_PER_LEASE = 6


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a lock."""

    host: str
    machine: str
    """What tells whether a process number means the same process: the system's start and its space of processes."""
    pid: int
    command: str
    started: str
    """UTC, as are all times."""
    token: str
    """Tells this lock from others of the same process."""
    expires: float
    """Seconds since 1970."""

    @classmethod
    def me(cls, command: str, lease: float) -> Self:
        """This process."""
        return cls(host=socket.gethostname(), machine=machine(), pid=os.getpid(), command=command,
                   started=_utc(time.time()), token=secrets.token_hex(8), expires=time.time() + lease)

    def is_gone(self) -> bool:
        """Whether its process is known to have ended: it ran here, and there is none of that number now."""
        return (self.host, self.machine) == (socket.gethostname(), machine()) and not is_running(self.pid)

    def __str__(self) -> str:
        return f"`{self.command}`, process {self.pid} on {self.host}, since {self.started}"


class FolderLock:
    """Held from entering to leaving; a context manager."""

    def __init__(self, folder: Path, command: str, *, lease: float = LEASE_SECONDS) -> None:
        """``command`` is what others read that find the folder locked."""
        self.path, self.command, self.lease = Path(folder) / NAME, command, lease
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            ArtifactError: another process has it.
        """
        while not self._create():
            self._remove_dead()
        self._beat = threading.Thread(target=self._renew, name="folder lock", daemon=True)
        self._beat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._beat.join()
        if self._is_mine():
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def check(self) -> None:
        """Make sure that the lock is still held, just before the step that others will see.

        Raises:
            ArtifactError: it was taken, as this process gave no sign of life for too long.
        """
        if not self._is_mine():
            raise ArtifactError(f"{self.path}: another process took the lock while this one stood still; nothing was "
                                "changed; give the command again")

    def _create(self) -> bool:
        """Create the file, whole; false where it is there already."""
        self.owner = Owner.me(self.command, self.lease)
        temporary = self.path.with_name(f".{NAME}.{self.owner.token}.tmp")
        self._descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        try:
            self._write(self.owner.expires)
            os.fsync(self._descriptor)
            os.link(temporary, self.path)
        except OSError as error:
            os.close(self._descriptor)
            if isinstance(error, FileExistsError | FileNotFoundError):  # held; its owner may have cleared our file
                return False
            error.filename, error.filename2 = str(self.path), None
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _write(self, expires: float) -> None:
        # every writing has the same length, so a reader never meets the rest of a longer one
        fields = asdict(self.owner) | {"expires": round(expires, 3), "expires_utc": _utc(expires)}
        os.pwrite(self._descriptor, (json.dumps(fields, indent=1) + "\n").ljust(1024).encode(), 0)

    def _renew(self) -> None:
        while not self._stop.wait(self.lease / SIGNS_PER_LEASE):
            with contextlib.suppress(OSError):  # whoever finds the lock expired may take it; check() tells
                self._write(time.time() + self.lease)

    def _is_mine(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except OSError:
            return False

    def _remove_dead(self) -> None:
        """Take away a lock whose owner is gone.

        Raises:
            ArtifactError: the owner lives, or may live.
        """
        try:
            found, written = read_owner(self.path), self.path.stat().st_mtime
        except FileNotFoundError:
            return
        expires = found.expires if found else written + self.lease
        is_gone = found is not None and found.is_gone()
        if not is_gone and time.time() < expires:
            raise ArtifactError(f"{self.path.parent}: locked by {found or 'a process that is not named'}; wait for it; "
                                f"without a sign of life from it the lock is free at {_utc(expires)}")
        aside = self.path.with_name(f".{NAME}.{secrets.token_hex(4)}.tmp")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            taken = read_owner(aside)
            if (taken and taken.token) != (found and found.token):  # another writer was faster, and this is its lock
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            else:
                why = "its process is gone" if is_gone else f"no sign of life since it expired at {_utc(expires)}"
                print(f"{self.path.parent}: takes over the lock of {found or 'an unknown process'}: {why}",
                      file=sys.stderr, flush=True)
            aside.unlink()


def read_owner(path: Path) -> Owner | None:
    """What a lock says; None where it says nothing readable.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        fields = json.loads(path.read_text())
        fields.pop("expires_utc")
        return Owner(**fields)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
