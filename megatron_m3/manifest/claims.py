"""Claims: processes that know of each other only by a folder share out pieces of work, and outlive one another.

A claim is a small file, made by whoever comes first. Its owner gives signs of life; when they cease, or its process is
gone from this machine, others take the piece over. Two may then do the same piece, if the owner was only slow: so a
piece must come out the same whoever does it, and be put in place in one step.
"""

import contextlib
import os
import re
import secrets
import threading
from pathlib import Path
from typing import Self

from megatron_m3.manifest.process import is_running, place

CLAIMS = ".claims"
"""Folder in the folder of an artifact that is being made."""
SIGN_SECONDS = 5.0
"""Most time between two signs of life."""
EXPIRY_SECONDS = 60.0
"""A claim ends when its owner's last sign is older than this."""
OWNER = re.compile(r"(?P<place>.+)-(?P<pid>\d+)-[0-9a-f]+")


class Claims:
    """This process's claims in ``folder``, which it gives up at the end of the context; others may share the folder.

    All times are the file system's, so that clocks of machines may differ. The folder vanishes with its last process.
    """

    def __init__(self, folder: Path, *, expiry: float = EXPIRY_SECONDS) -> None:
        self.folder, self.expiry = folder, expiry
        self.owner = f"{place()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._held, self._over = set[str](), threading.Event()
        self._thread = threading.Thread(target=self._give_signs, daemon=True)

    def __enter__(self) -> Self:
        while True:
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir(parents=True)
            with contextlib.suppress(FileNotFoundError):  # the last of the others removes the folder just now
                self._sign(self.owner).touch()
                break
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        for name in list(self._held):
            self.release(name)
        self._sign(self.owner).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are still there, or it is gone
            self.folder.rmdir()

    def take(self, name: str) -> bool:
        """Claim a piece; false where another living process has it, or this one already."""
        path = self._claim(name)
        for _ in range(2):
            with contextlib.suppress(FileExistsError):
                with path.open("x") as stream:
                    stream.write(self.owner)
                self._held.add(name)
                return True
            if self._is_taken(path):
                return False
            # of two that come here at once one may remove the other's new claim: then both do the piece
            path.unlink(missing_ok=True)
        return False

    def holds(self, name: str) -> bool:
        """Whether the piece is still this process's: false after it was thought dead and another took over."""
        return _read(self._claim(name)) == self.owner

    def release(self, name: str) -> None:
        """Give up a piece, done or not."""
        if self.holds(name):
            self._claim(name).unlink(missing_ok=True)
        self._held.discard(name)

    def is_taken(self, name: str) -> bool:
        """Whether a living process has the piece."""
        return self._is_taken(self._claim(name))

    def clear(self) -> None:
        """Remove what dead processes left in the folder."""
        for path in self.folder.glob("*.claim"):
            if not self._is_taken(path):
                path.unlink(missing_ok=True)
        for path in self.folder.glob("*.alive"):
            if not self._is_alive(path.stem):
                path.unlink(missing_ok=True)

    def _claim(self, name: str) -> Path:
        return self.folder / f"{name}.claim"

    def _sign(self, owner: str) -> Path:
        return self.folder / f"{owner}.alive"

    def _give_signs(self) -> None:
        while not self._over.wait(min(SIGN_SECONDS, self.expiry / 4)):
            with contextlib.suppress(OSError):
                self._sign(self.owner).touch()

    def _is_taken(self, path: Path) -> bool:
        owner = _read(path)
        if owner is None:
            return False
        if not OWNER.fullmatch(owner):  # its owner is just about to write its name, or died before it had
            return self._is_fresh(path)
        return self._is_alive(owner)

    def _is_alive(self, owner: str) -> bool:
        found = OWNER.fullmatch(owner)
        if found and found["place"] == place() and not is_running(int(found["pid"])):
            return False
        return self._is_fresh(self._sign(owner))

    def _is_fresh(self, path: Path) -> bool:
        mine = self._sign(self.owner)
        try:
            mine.touch()
            return mine.stat().st_mtime - path.stat().st_mtime <= self.expiry
        except FileNotFoundError:
            return False


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
