"""A web server of a folder that serves byte ranges, and can misbehave in named ways."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class RangeServer:
    """What is served, how, and what was asked for."""

    folder: Path
    address: str = ""
    fault: str = ""
    """Of shards: whole, short, other range, redirect, forbidden, missing, broken, hang up once."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Path and Range of each request."""
    connections: int = 0


@contextmanager
def serve(folder: Path) -> Iterator[RangeServer]:
    """Serve ``folder`` on a free port of this machine for the length of a block."""
    served = RangeServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16

        def setup(self) -> None:
            served.connections += 1
            super().setup()

        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            served.asked.append((self.path, wanted))
            path = served.folder / self.path.lstrip("/")
            fault = served.fault if path.suffix == ".bin" else ""
            if fault == "hang up once":
                served.fault, self.close_connection = "", True
                return
            statuses = {"redirect": 302, "forbidden": 403, "missing": 404, "broken": 500}
            if fault in statuses or not path.is_file():
                self.answer(statuses.get(fault, 404), b"", {"Location": "http://elsewhere/bank"})
                return
            size = path.stat().st_size
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
            if found is None or fault == "whole":
                self.answer(200, path.read_bytes(), {})
                return
            first, last = int(found[1]), int(found[2])
            if last >= size:
                self.answer(416, b"", {})
                return
            with path.open("rb") as file:
                file.seek(first)
                data = file.read(last + 1 - first)
            said = f"bytes {first + (fault == 'other range')}-{last}/{size}"
            self.answer(206, data, {"Content-Range": said}, short=fault == "short")

        def answer(self, status: int, data: bytes, headers: dict[str, str], *, short: bool = False) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if short else data)
            self.close_connection = self.close_connection or short

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    served.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def in_a_process(folder: Path) -> Iterator[str]:
    """Serve ``folder`` from another process for the length of a block; its address."""
    code = ("import sys; from pathlib import Path; from tests.range_server import serve\n"
            "with serve(Path(sys.argv[1])) as served: print(served.address, flush=True); sys.stdin.read()")
    server = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True)
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        yield server.stdout.readline().strip()
    finally:
        server.stdin.close()
        server.wait()
        server.stdout.close()
