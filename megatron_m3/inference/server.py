"""HTTP in front of a service: OpenAI's completions, whole or as a stream, and what an operator asks."""

import asyncio
import json
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from megatron_m3.inference.completions import Answer, CompletionRequest, RequestError, Serving, read_request
from megatron_m3.inference.generation import Continuation
from megatron_m3.inference.sampling import draws
from megatron_m3.inference.service import BrokenError, BusyError, Piece, Service, Ticket
from megatron_m3.inference.writer import Writer

MAX_BODY_BYTES = 1 << 24
BODY_SECONDS = 30.0
"""A request has a place from its first byte on, so its body may not take longer."""
CUT_SECONDS = 5
"""A connection that is still there, so long after its request was told that the server leaves, is cut."""
REPORT_SECONDS = 60.0
GONE = 499
"""Status, in the metrics alone, of a request whose client left before its answer."""
OWN_ERROR = RequestError("the server met an error of its own; see its log", status=500)
LEAVES = RequestError("the server leaves; ask another, or again when it is back", status=503)


class Server(uvicorn.Server):
    """Answers at listening sockets, given to :meth:`run`, until :meth:`leave`. Signals are the caller's business."""

    def __init__(self, serving: Serving, service: Service, *, leave_seconds: int) -> None:
        """Closes the service in the end; requests that then take longer than ``leave_seconds`` are told that."""
        self.routes, self.leave_seconds = _Routes(serving, service), leave_seconds
        super().__init__(uvicorn.Config(_app(self.routes), log_level="warning", access_log=False,
                                        timeout_graceful_shutdown=leave_seconds + CUT_SECONDS))
        service.on_failure = self.leave

    def leave(self) -> None:
        """Take no more requests, finish those that run or wait, and return from :meth:`run`."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the requests, the last of them for so long as they are given."""
        end = asyncio.get_running_loop().call_later(self.leave_seconds, self.routes.end)
        await super().shutdown(sockets)
        end.cancel()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Nothing: uvicorn's handlers would end the process by the signal."""
        yield


def _app(server: "_Routes") -> Starlette:
    """The routes over a running service, which is closed when the server leaves."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        reporting = asyncio.create_task(server.report())
        yield
        reporting.cancel()
        await run_in_threadpool(server.service.close)

    routes = [
        Route("/v1/completions", server.complete, methods=["POST"]),
        Route("/v1/models", server.models),
        Route("/health", server.health),
        Route("/metrics", server.metrics),
    ]
    handlers = {HTTPException: _http_error, Exception: _own_error}
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    refused = RequestError(f"{request.method} {request.url.path}: {error.detail.lower()}", status=error.status_code)
    return JSONResponse(refused.body, error.status_code, headers=error.headers)


async def _own_error(request: Request, error: Exception) -> Response:
    """A fault of ours; its traceback is in the log."""
    return JSONResponse(OWN_ERROR.body, 500)


class _ClientGoneError(Exception):
    """Nobody waits for the answer."""


class _Routes:
    def __init__(self, serving: Serving, service: Service) -> None:
        self.serving, self.service = serving, service
        self.taken = 0
        """Requests for completions that are being read, wait or run."""
        self.works: set[_Work] = set()
        self.ended = False

    def end(self) -> None:
        """Tell all requests that the server leaves."""
        self.ended = True
        for work in self.works:
            work.news.put_nowait(LEAVES)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.serving.model()]})

    async def health(self, request: Request) -> Response:
        if self.service.failure is not None:
            return JSONResponse({"status": "failed", "error": self.service.told}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def report(self) -> None:
        """A line in the log now and then, if there was work."""
        metrics, before = self.service.metrics, 0.0
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            tokens = metrics.value("m3_generated_tokens_total")
            if tokens > before:
                running, waiting = metrics.value("m3_batch_size"), metrics.value("m3_waiting_prompts")
                print(f"{tokens - before:,.0f} tokens in {REPORT_SECONDS:.0f} s, {tokens:,.0f} in all | "
                      f"{running:.0f} prompts run, {waiting:.0f} wait | "
                      f"{metrics.value('m3_memories_read_total'):,.0f} memories read", file=sys.stderr, flush=True)
            before = tokens

    async def complete(self, request: Request) -> Response:
        most = self.service.batch + self.service.queue
        if self.taken >= most:
            self.service.metrics.requests.labels(429).inc()
            return _refusal(RequestError(f"{most} requests are here already; try again later", status=429,
                                         code="queue_full"))
        self.taken += 1
        try:
            body = await _read_body(request)
            asked, prompts = await run_in_threadpool(read_request, body, self.serving)
            if self.ended:
                raise LEAVES
            work = _Work(self, request, asked, prompts)
            if asked.stream:
                return _Stream(work, self._done)
            answer: Response = JSONResponse(await work.whole())
        except RequestError as error:
            answer = _refusal(error)
        except (_ClientGoneError, ClientDisconnect):
            answer = Response(status_code=GONE)
        except BaseException:
            self._done(500)
            raise
        self._done(answer.status_code)
        return answer

    def _done(self, status: int) -> None:
        self.taken -= 1
        self.service.metrics.requests.labels(status).inc()


def _refusal(error: RequestError) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body, error.status, headers=headers)


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise RequestError(f"body: more than {MAX_BODY_BYTES:,} bytes; shorten it", status=413)
    except TimeoutError:
        raise RequestError(f"body: not whole after {BODY_SECONDS:g} seconds; send it at once", status=408) from None
    return bytes(body)


class _Work:
    """The prompts of one request, while the service has them. What the client does not wait for is dropped."""

    def __init__(self, server: _Routes, request: Request, asked: CompletionRequest, prompts: list[list[int]]) -> None:
        """
        Raises:
            RequestError: the line is full, or too short for so many prompts.
        """
        self.request, self.asked, self.status = request, asked, GONE
        self.answer = Answer(request=asked, serving=server.serving)
        self.works = server.works
        self.news: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        tokenizer = server.serving.engine.loaded.tokenizer
        self.tickets = [
            Ticket(
                index=index,
                continuation=Continuation(prompt=prompt, max_new_tokens=asked.max_tokens, draw=draw),
                writer=Writer(tokenizer, asked.stop),
                tell=self._tell,
                in_pieces=asked.stream,
            )
            for index, (prompt, draw) in enumerate(zip(prompts, draws(asked.sampling, prompts), strict=True))
        ]
        if len(prompts) > server.service.queue:
            raise RequestError(f"prompt: {len(prompts)} prompts; give at most {server.service.queue}", param="prompt")
        try:
            server.service.submit(self.tickets)
        except BusyError as error:
            raise RequestError(str(error), status=429, code="queue_full") from None
        except BrokenError as error:
            raise RequestError(str(error), status=503) from None
        self.works.add(self)

    def _tell(self, piece: Piece) -> None:
        self.loop.call_soon_threadsafe(self.news.put_nowait, piece)

    async def _choices(self) -> AsyncIterator[dict[str, Any]]:
        """Pieces of the answer as they come, until every prompt has its last one."""
        watching = asyncio.create_task(self._watch())
        left = len(self.tickets)
        try:
            while left:
                piece = await self.news.get()
                if isinstance(piece, Exception):
                    raise piece
                if piece.reason == "failed":
                    raise RequestError(piece.error, status=500)
                left -= piece.reason is not None
                yield self.answer.choice(piece.ticket.index, piece.text, piece.reason, piece.ticket.continuation)
        finally:
            watching.cancel()
            self.drop()

    async def _watch(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.drop()
        self.news.put_nowait(_ClientGoneError())

    def drop(self) -> None:
        """Have the service forget what is not done."""
        self.works.discard(self)
        for ticket in self.tickets:
            ticket.dropped = True

    def _continuations(self) -> list[Continuation]:
        return [ticket.continuation for ticket in self.tickets]

    async def whole(self) -> dict[str, Any]:
        choices = [choice async for choice in self._choices()]
        return self.answer.message(sorted(choices, key=lambda choice: choice["index"]), self._continuations())

    async def stream(self) -> AsyncIterator[str]:
        """The messages of a stream; :attr:`status` tells in the end how it went."""
        try:
            async for choice in self._choices():
                yield _event(self.answer.message([choice]))
            if self.asked.stream_options.include_usage:
                yield _event(self.answer.message([], self._continuations()))
            yield "data: [DONE]\n\n"
            self.status = 200
        except RequestError as error:
            self.status = error.status
            yield _event(error.body)
        except _ClientGoneError:
            pass
        except Exception as error:
            self.status = 500
            traceback.print_exception(error)
            yield _event(OWN_ERROR.body)


class _Stream(StreamingResponse):
    """The answer as it comes; when it ends, or its client has gone, its prompts leave."""

    def __init__(self, work: _Work, done: Callable[[int], None]) -> None:
        super().__init__(work.stream(), headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        self.work, self.done = work, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.work.drop()
            self.done(self.work.status)


def _event(message: dict[str, Any]) -> str:
    return f"data: {json.dumps(message)}\n\n"
