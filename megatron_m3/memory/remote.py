"""A bank on a web server: its description is downloaded, records are read by HTTP range requests."""

import contextlib
import http.client
import json
import operator
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np

from megatron_m3.errors import ArtifactError

TIMEOUT = 30.0
"""Seconds without an answer."""
DESCRIPTION_BYTES = 1 << 30
"""Most bytes of a file that is downloaded whole."""
DROPPED = (http.client.BadStatusLine, http.client.CannotSendRequest, ConnectionResetError, BrokenPipeError)
"""What a connection that the server has closed meanwhile raises; it is opened again once."""


def is_url(folder: str | Path) -> bool:
    """Whether a bank's folder is an address on the web."""
    return str(folder).startswith(("http://", "https://"))


class HttpStorage:
    """The files under an address; each thread keeps its own connection open."""

    threads, records, gap = 16, 1, 1 << 14

    def __init__(self, address: str) -> None:
        """``address`` is that of the bank's folder, http or https.

        Raises:
            ArtifactError: it is not one.
        """
        self.address = address.rstrip("/")
        try:
            parts = urlsplit(self.address)
            # as http.client sends it; what is quoted already stays so
            self._host, self._port = (parts.hostname or "").encode("idna").decode(), parts.port
            self._path = quote(parts.path, safe="/%")
        except ValueError:
            self._host = ""
        if not self._host or parts.query or parts.fragment:
            raise ArtifactError(f"{address}: not the address of a folder; give one like http://host/bank")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._threads = threading.local()

    def read(self, name: str, offset: int, buffers: Sequence[np.ndarray]) -> None:
        """See :class:`megatron_m3.memory.storage.Storage`."""
        wanted = sum(map(operator.attrgetter("nbytes"), buffers))
        last = offset + wanted - 1
        with self._answer(name, {"Range": f"bytes={offset}-{last}"}) as answer:
            if answer.status == http.client.OK:
                raise self._refuse(name, "the server ignores Range, it would send whole files; use one that serves "
                                         "ranges")
            said = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("Content-Range", ""))
            if said is None or (int(said[1]), int(said[2])) != (offset, last):
                raise self._refuse(name, f"bytes {offset}-{last} asked for, the server sends "
                                         f"{answer.headers.get('Content-Range', 'others')}; upload the bank again")
            for buffer in buffers:
                view = memoryview(buffer)
                while len(view):
                    count = answer.readinto(view)
                    if not count:
                        raise self._refuse(name, f"the answer is shorter than the {wanted} bytes asked for; try again")
                    view = view[count:]

    def whole(self, name: str) -> bytes:
        """All bytes of a small file.

        Raises:
            ArtifactError: the server does not send it.
        """
        with self._answer(name, {}) as answer:
            data = answer.read(DESCRIPTION_BYTES + 1)
            if len(data) > DESCRIPTION_BYTES or (answer.length or 0) > 0:
                raise self._refuse(name, "longer or shorter than a bank's; upload the bank again")
            return data

    @contextlib.contextmanager
    def _answer(self, name: str, headers: dict[str, str]) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request, which is one of success; the connection stays open if the block ends well."""
        try:
            try:
                answer = self._ask(name, headers)
            except DROPPED:
                self._close()
                answer = self._ask(name, headers)
            if answer.status not in (http.client.OK, http.client.PARTIAL_CONTENT):
                raise self._refuse(name, _reason(answer))
            yield answer
            if not answer.isclosed():
                self._close()
        except (http.client.HTTPException, OSError) as error:
            self._close()
            raise self._refuse(name, f"{error or type(error).__name__}; is the server there?") from None
        except BaseException:
            self._close()
            raise

    def _ask(self, name: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        connection = getattr(self._threads, "connection", None)
        if connection is None:
            connection = self._threads.connection = self._kind(self._host, self._port, timeout=TIMEOUT)
        connection.request("GET", f"{self._path}/{quote(name)}", headers=headers | {"Accept-Encoding": "identity"})
        answer: http.client.HTTPResponse = connection.getresponse()
        return answer

    def _close(self) -> None:
        connection = self._threads.__dict__.pop("connection", None)
        if connection is not None:
            connection.close()

    def _refuse(self, name: str, why: str) -> ArtifactError:
        return ArtifactError(f"{self.address}/{name}: {why}")


def _reason(answer: http.client.HTTPResponse) -> str:
    """Why an answer is no success, and the mend."""
    said = f"{answer.status} {answer.reason}"
    if 300 <= answer.status < 400:
        return f"{said}: moved to {answer.headers.get('Location', 'nowhere')}; give the bank's address there"
    if answer.status in (401, 403):
        return f"{said}: the server does not let it be read; use one that does"
    if answer.status == 404:
        return f"{said}: not there; give the address of a bank's folder"
    if answer.status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
        return f"{said}: cut short; upload the bank again"
    return f"{said}; try again later"


def download_description(storage: HttpStorage, folder: Path, codec: str) -> None:
    """Write a bank's manifest and its codec, all but the shards, into ``folder``.

    Raises:
        ArtifactError: the server does not send them.
    """
    for part in ("", f"{codec}/"):
        (folder / part).mkdir(exist_ok=True)
        data = storage.whole(f"{part}manifest.json")
        (folder / part / "manifest.json").write_bytes(data)
    try:
        names = [str(name) for name in json.loads(data)["files"]]
    except (ValueError, KeyError, TypeError):
        names = []
    for name in names:
        if "/" not in name and not name.startswith("."):
            (folder / codec / name).write_bytes(storage.whole(f"{codec}/{name}"))
