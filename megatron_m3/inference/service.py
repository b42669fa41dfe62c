"""One thread that generates for many: prompts wait in line, and join the running batch between its steps.

Each prompt has its own errors, of reading, sampling or writing: it leaves, and the others go on. An error of a whole
pass ends those that run; a lost device ends the service.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from megatron_m3.errors import M3Error, user_message
from megatron_m3.inference.batch import Batch
from megatron_m3.inference.engine import Engine
from megatron_m3.inference.generation import Continuation, Statistics
from megatron_m3.inference.metrics import Metrics
from megatron_m3.inference.writer import Writer

Reason = Literal["stop", "length", "failed"]


class BusyError(M3Error):
    """The line is full."""


class BrokenError(M3Error):
    """The service can generate no more."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """News of one prompt."""

    ticket: "Ticket"
    text: str
    """Generated since the last piece."""
    reason: Reason | None
    """Why this is the last piece: EOS or a stop text, the limit of tokens, or an error; None: more comes."""
    error: str = ""


@dataclass(kw_only=True, eq=False)
class Ticket:
    """One prompt in the hands of the service."""

    index: int
    """Which prompt of its request."""
    continuation: Continuation
    writer: Writer
    tell: Callable[[Piece], None]
    """Takes news, in the service's thread."""
    in_pieces: bool
    """Whether to tell of text as it comes, or once at the end."""
    dropped: bool = False
    """Set when nobody wants it any more: it leaves before the next step, without news."""
    since: float = field(default_factory=time.monotonic)
    written: int = 0
    """Tokens that are text already."""
    untold: str = ""


class Service:
    """Generates with one engine for any number of threads that :meth:`submit`."""

    def __init__(self, engine: Engine, metrics: Metrics, *, batch: int, queue: int) -> None:
        """At most ``batch`` prompts run together and ``queue`` wait."""
        self.engine, self.metrics, self.batch, self.queue = engine, metrics, batch, queue
        self.failure: BaseException | None = None
        """What broke the service; nothing is generated after it."""
        self.on_failure: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Take the prompts of one request into the line.

        Raises:
            BusyError: the line has no room for all of them.
            BrokenError: the service is broken.
        """
        with self._changed:
            if self.failure is not None:
                raise BrokenError(self.told)
            self._waiting = deque(one for one in self._waiting if not one.dropped)
            if len(self._waiting) + len(tickets) > self.queue:
                raise BusyError(f"{len(self._waiting)} prompts wait already, of at most {self.queue}; try again later")
            self._waiting.extend(tickets)
            self.metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    @property
    def told(self) -> str:
        """What users are told of :attr:`failure`; empty while there is none."""
        if self.failure is None:
            return ""
        return f"the server has failed and leaves ({type(self.failure).__name__}: {_first_line(self.failure)})"

    def close(self) -> None:
        """Drop what there is and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self._generate()
        except BaseException as error:
            with self._changed:
                self.failure = error
                left = [*self._running, *self._waiting]
            self._refuse(left, self.told)
            self.on_failure()

    def _generate(self) -> None:
        batch: Batch | None = None
        while True:
            admitted = self._admit()
            if self._closing:
                return
            for ticket in self._running:
                ticket.continuation.dropped |= ticket.dropped
            if batch is not None and not batch.goes_on:
                batch = None
            if admitted:
                batch = self._begin(admitted, batch)
            elif batch is not None:
                batch = self._step(batch)
            self._running = [ticket for ticket in self._running if self._goes_on(ticket)]
            self.metrics.running.set(len(self._running))

    def _admit(self) -> list[Ticket]:
        """Those who join the batch now; waits while there is nothing to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._closing)
            room = self.batch - len(self._running)
            admitted = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            self.metrics.waiting.set(len(self._waiting))
        return [ticket for ticket in admitted if not ticket.dropped]

    def _begin(self, admitted: list[Ticket], batch: Batch | None) -> Batch | None:
        """Read the prompts of those who join; the batch with them. Those whose prompts fail alone too are refused."""
        self._running += admitted
        for new in self._read(admitted):
            try:
                if batch is not None:
                    batch.join(new)
            except Exception as error:
                self._refuse(self._running, self._blame(error))
                return None
            batch = batch or new
        return batch

    def _read(self, tickets: list[Ticket]) -> list[Batch]:
        """Prefill prompts together, or where that fails each alone; those that succeeded."""
        again = [ticket.continuation.afresh() for ticket in tickets]
        batch = self.engine.batch([ticket.continuation for ticket in tickets])
        try:
            self._count(batch, batch.prefill)
            return [batch]
        except Exception as error:
            if len(tickets) == 1:
                self._refuse(tickets, self._blame(error))
                return []
        del batch  # and the room that its cache took
        for ticket, continuation in zip(tickets, again, strict=True):
            ticket.continuation = continuation
        return [one for ticket in tickets for one in self._read([ticket])]

    def _step(self, batch: Batch) -> Batch | None:
        """One more token for each; where that fails as a whole, all are refused."""
        try:
            self._count(batch, batch.step)
        except Exception as error:
            self._refuse(self._running, self._blame(error))
            return None
        return batch

    def _count(self, batch: Batch, work: Callable[[], None]) -> None:
        """Let a batch do one pass, and count what it did."""
        before = sum(len(one.tokens) for one in batch.continuations)
        recall = self.engine.recall
        counts = replace(recall.source.counts) if recall else None
        everyone = list(batch.continuations)
        work()
        statistics, batch.statistics = batch.statistics, Statistics()
        if recall and counts:
            statistics.count_reading(recall.source.counts.since(counts))
        self.metrics.count(statistics, sum(len(one.tokens) for one in everyone) - before)

    def _goes_on(self, ticket: Ticket) -> bool:
        """Tell of what is new; whether the prompt is still being continued."""
        try:
            failure = ticket.continuation.failure
            if failure is None or ticket.continuation.dropped:
                return self._tell(ticket)
        except Exception as error:
            failure = error
        self._refuse([ticket], self._blame(failure))
        return False

    def _tell(self, ticket: Ticket) -> bool:
        one, writer = ticket.continuation, ticket.writer
        if not ticket.written and (one.tokens or one.ended):
            self.metrics.first_token_seconds.observe(time.monotonic() - ticket.since)
        ticket.untold += writer.push(one.tokens[ticket.written :])
        ticket.written = len(one.tokens)
        if one.dropped:
            return False
        reason: Reason | None = None
        if writer.stopped or not one.goes_on:
            ticket.untold += writer.finish()
            reason = "stop" if writer.stopped or one.ended else "length"
            one.dropped = True
            self.metrics.request_seconds.observe(time.monotonic() - ticket.since)
        if reason or (ticket.in_pieces and ticket.untold):
            ticket.tell(Piece(ticket=ticket, text=ticket.untold, reason=reason))
            ticket.untold = ""
        return reason is None

    def _refuse(self, tickets: Sequence[Ticket], why: str) -> None:
        for ticket in tickets:
            ticket.continuation.dropped = True
            ticket.tell(Piece(ticket=ticket, text="", reason="failed", error=why))

    def _blame(self, error: Exception) -> str:
        """What the user is told of an error; it is raised again if the device is lost, so that nothing can go on."""
        if isinstance(error, torch.OutOfMemoryError):
            return "the device has no memory left; start the server with a smaller --batch or --context"
        message = user_message(error)
        if message is None:
            traceback.print_exception(error)
            try:
                torch.ones(1, device=self.engine.loaded.device).sum().item()
            except RuntimeError as lost:
                raise lost from error
            message = f"the server met an error of its own ({type(error).__name__}); see its log"
        return message


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
