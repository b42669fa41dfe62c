"""m3 serve: answer OpenAI's completions over HTTP, with recall every 64 tokens, showing the references read.

    m3 serve --checkpoint run --references references --index index --bank bank
    curl localhost:8000/v1/completions -d '{"prompt": "A whale is", "max_tokens": 40, "memories": true}'

SIGTERM, SIGUSR1 and Ctrl-C end it: it takes no more requests, finishes those it has, and leaves with status 0.
"""

import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from launch.engine import EngineOptions, build_engine
from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, UnsupportedError, exit_on_user_error
from megatron_m3.manifest import atomic_path

if TYPE_CHECKING:
    from megatron_m3.inference.completions import Serving
    from megatron_m3.inference.server import Server

EVERYWHERE = ("", "0.0.0.0", "::")


@dataclass(frozen=True, kw_only=True)
class ServeOptions(EngineOptions):
    """What is served, where, and how much at once."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all of this machine. There is no password."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    address_file: str = ""
    """File that holds HOST:PORT while the server listens."""
    name: str = ""
    """Model's name in requests; by default that of the checkpoint's folder."""
    batch: int = 16
    """Prompts continued together; further ones wait in line."""
    queue: int = 256
    """Prompts that may wait; further requests are refused with status 429."""
    context: int = 0
    """Tokens of a prompt and its completion; 0 takes what the model was made for."""
    leave_seconds: int = 60
    """Asked to end, requests that take longer than this get status 503."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch", "queue", "leave_seconds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.context < 0 or self.context == 1:
            raise ConfigError(f"context={self.context}: must be 0 (the model's) or at least 2, BOS and a token")
        if self.address_file and Path(self.address_file).is_dir():
            raise ConfigError(f"address_file={self.address_file}: is a folder; give a file")
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port={self.port}: must be from 0 (a free one) to 65535")


class _Leaving:
    """Signals that end the server, from the first moment on: before it listens, at once."""

    def __init__(self, address_file: str) -> None:
        self.address_file = Path(address_file) if address_file else None
        self.server: Server | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._leave)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        if self.server is None:
            sys.exit(0)
        self.forget_address()
        self.server.leave()

    def forget_address(self) -> None:
        """Remove the file that says where the server listens."""
        if self.address_file is not None:
            self.address_file.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until a signal comes."""
    options = parse(ServeOptions, argv, "m3 serve", __doc__ or "")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UnsupportedError(f"serve: started as one of {os.environ['WORLD_SIZE']} processes, but a server is one "
                               "process on one device, without tensor parallelism; start it without torchrun")
    leaving = _Leaving(options.address_file)
    with bind(options.host, options.port) as listener:
        serve(options, listener, leaving)


def serve(options: ServeOptions, listener: socket.socket, leaving: _Leaving) -> None:
    """Open the model and answer at ``listener``.

    Raises:
        BaseException: what broke the generation.
    """
    from megatron_m3.platform import select

    select()
    from megatron_m3.inference.metrics import Metrics
    from megatron_m3.inference.server import Server
    from megatron_m3.inference.service import Service

    serving = open_serving(options)
    service = Service(serving.engine, Metrics(), batch=options.batch, queue=options.queue)
    server = Server(serving, service, leave_seconds=options.leave_seconds)
    listener.listen(server.config.backlog)
    leaving.server = server
    announce(address_of(listener, options.host), options.address_file, serving)
    try:
        server.run(sockets=[listener])
    finally:
        leaving.forget_address()
    if service.failure is not None:
        raise service.failure


def open_serving(options: ServeOptions) -> "Serving":
    """The engine, with the name and the context under which it is served."""
    from megatron_m3.inference.completions import Serving
    from megatron_m3.inference.context import context_of

    engine = build_engine(options)
    context = context_of(engine.loaded, reads_memories=engine.recall is not None)
    if options.context > context:
        raise ConfigError(f"context={options.context}: more than the {context} tokens that the model was made for")
    return Serving(engine=engine, name=options.name or Path(options.checkpoint).resolve().name,
                   context=options.context or context)


@contextmanager
def bind(host: str, port: int) -> Iterator[socket.socket]:
    """A socket with its address, not yet listening.

    Raises:
        ConfigError: there is no such address here, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no name of a machine"
        raise ConfigError(f"host={host}, port={port}: {reason}; choose another --host or --port") from None
    with listener:
        yield listener


def address_of(listener: socket.socket, host: str) -> str:
    """HOST:PORT by which others reach a socket."""
    name = socket.gethostname() if host in EVERYWHERE else host
    return f"[{name}]:{listener.getsockname()[1]}" if ":" in name else f"{name}:{listener.getsockname()[1]}"


def announce(address: str, file: str, serving: "Serving") -> None:
    """Say where the server listens: on stderr, and in a file."""
    recall = serving.engine.recall
    reading = f"{len(recall.retriever.references):,} references" if recall else "no memory"
    print(f"serving {serving.name} at http://{address} ({reading}, context {serving.context:,})", file=sys.stderr,
          flush=True)
    if file:
        with atomic_path(Path(file)) as temporary:
            temporary.write_text(f"{address}\n")


if __name__ == "__main__":
    exit_on_user_error(main)
