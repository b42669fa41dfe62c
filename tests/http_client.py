"""What asks a server of completions, and one in this process to be asked."""

import json
import socket
import threading
from contextlib import contextmanager

import requests

from launch.serve import bind


class Client:
    """Asks a server on this machine."""

    def __init__(self, address):
        self.address = f"http://{address}"

    def ask(self, **fields):
        return requests.post(f"{self.address}/v1/completions", data=json.dumps(fields), timeout=120)

    def choices(self, **fields):
        answer = self.ask(**fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    def stream(self, **fields):
        """The messages of a stream, one by one; closing the generator closes the connection."""
        with requests.post(f"{self.address}/v1/completions", json=fields | {"stream": True}, stream=True,
                           timeout=120) as answer:
            assert answer.status_code == 200, answer.text
            for line in answer.iter_lines(chunk_size=1):
                if line:
                    told = line.decode().removeprefix("data: ")
                    yield told if told == "[DONE]" else json.loads(told)

    def metric(self, name):
        """0 where nothing was counted yet."""
        lines = requests.get(f"{self.address}/metrics", timeout=120).text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0)


@contextmanager
def listening(server):
    """A client of a server in this process, which leaves in the end."""
    with bind("127.0.0.1", 0) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # a client that does not read is soon felt
        listener.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Client(f"127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.leave()
            thread.join()
