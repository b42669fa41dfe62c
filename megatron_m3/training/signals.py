"""Requests from outside to save, or to save and leave: SIGTERM, SIGUSR1, or a file in the run's folder.

    touch RUN/SAVE    save after this step and go on
    touch RUN/STOP    save after this step and leave, as the signals do
"""

import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

NOTHING, SAVE, LEAVE = 0, 1, 2
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Requests:
    """Collects requests while its block runs; processes agree on them in the training step."""

    def __init__(self, folder: Path, *, watches_files: bool) -> None:
        """``watches_files`` is true on one process."""
        self.save_file, self.stop_file = Path(folder) / "SAVE", Path(folder) / "STOP"
        self.watches_files, self.received = watches_files, 0

    def __enter__(self) -> Self:
        self.before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    @property
    def pending(self) -> int:
        """What this process has been asked for: NOTHING, SAVE or LEAVE."""
        if self.received or (self.watches_files and self.stop_file.exists()):
            return LEAVE
        return SAVE if self.watches_files and self.save_file.exists() else NOTHING

    @property
    def reason(self) -> str:
        """Where the request came from, as far as this process knows."""
        if self.received:
            return signal.Signals(self.received).name
        return self.stop_file.name if self.stop_file.exists() else "signal to another process"

    def obeyed(self) -> None:
        """Forget the files."""
        if self.watches_files:
            self.save_file.unlink(missing_ok=True)
            self.stop_file.unlink(missing_ok=True)
