"""Progress on stderr: a bar with rate and time left on a terminal, a plain line now and then in a log."""

import sys
import time
from typing import Self, TextIO


def format_seconds(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Counts ``unit`` towards ``total``; use as a context manager and call :meth:`advance`."""

    def __init__(self, label: str, total: int, unit: str, *, enabled: bool = True, stream: TextIO | None = None,
                 seconds_between_lines: float = 10.0) -> None:
        self.label, self.total, self.unit, self.enabled = label, total, unit, enabled
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.interval = 0.1 if self.terminal else seconds_between_lines
        self.count, self.start, self.last = 0, time.monotonic(), 0.0

    def __enter__(self) -> Self:
        self.start = time.monotonic()
        self.last = self.start
        return self

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more, and show it if it is time."""
        self.count += count
        if self.enabled and time.monotonic() - self.last >= self.interval:
            self._show(end="\r" if self.terminal else "\n")

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self.enabled and kind is None:
            self._show(end="\n")

    def _show(self, end: str) -> None:
        now = time.monotonic()
        self.last = now
        rate = self.count / max(now - self.start, 1e-9)
        share = self.count / self.total if self.total else 1.0
        left = format_seconds((self.total - self.count) / rate) if rate else "?"
        bar = f"[{'#' * int(20 * share):<20}] " if self.terminal else ""
        state = f"{left} left" if self.count < self.total else f"took {format_seconds(now - self.start)}"
        counts = f"{100 * share:3.0f}% {self.count:,}/{self.total:,} {self.unit}, {rate:,.4g}/s"
        print(f"{self.label}: {bar}{counts}, {state}", end=end, file=self.stream, flush=True)
