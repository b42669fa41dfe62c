"""Tokens a second over HTTP beside the bare engine with the same prompts, for one client and for eight at once.

    python -m tests.benchmarks.bench_serving

Random weights, real glosses, memories from a bank. The server runs in this process, the clients in another. On a busy
machine the tokens in a CPU second of this process say more than those in a second.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import requests

from launch.serve import ServeOptions, bind, open_serving
from megatron_m3.config import ParallelConfig
from megatron_m3.platform.distributed import initialize_parallel, shut_down
from tests.benchmarks.bench_generation import make_artifacts, prompts_of

CLIENTS, BATCH, PROMPT, NEW, ROUNDS = (1, 8), 8, 128, 128, 3


def ask(address: str, prompt: list[int], stream: bool) -> int:
    """Tokens of one completion."""
    body = {"prompt": prompt, "max_tokens": NEW, "temperature": 0, "stream": stream,
            "stream_options": {"include_usage": True} if stream else None}
    answer = requests.post(f"{address}/v1/completions", json=body, timeout=600, stream=stream)
    answer.raise_for_status()
    last = answer.json() if not stream else json.loads([line for line in answer.iter_lines() if line][-2][6:])
    return int(last["usage"]["completion_tokens"])


def be_clients(address: str) -> None:
    """For each line of stdin, prompts to complete all at once, a line with how many tokens came."""
    for line in sys.stdin:
        prompts, stream = json.loads(line)
        with ThreadPoolExecutor(len(prompts)) as pool:
            tokens = sum(pool.map(lambda prompt: ask(address, prompt, stream), prompts))  # noqa: B023
        print(tokens, flush=True)


def best(work: Callable[[], int]) -> tuple[float, float]:
    """Tokens in a second, and in a CPU second of this process."""
    started, cpu = time.perf_counter(), time.process_time()
    tokens = work()
    return tokens / (time.perf_counter() - started), tokens / (time.process_time() - cpu)


def main() -> None:
    """Build everything in a temporary folder and print both ratios for each number of clients."""
    with tempfile.TemporaryDirectory() as name, bind("127.0.0.1", 0) as listener, ExitStack() as leaving:
        folder = Path(name)
        initialize_parallel(ParallelConfig(), seed=1)
        from megatron_m3.inference.metrics import Metrics
        from megatron_m3.inference.server import Server
        from megatron_m3.inference.service import Service

        make_artifacts(folder)
        options = {name: str(folder / name) for name in ("references", "index", "bank")}
        serving = open_serving(ServeOptions(checkpoint=str(folder / "run"), **options))
        server = Server(serving, Service(serving.engine, Metrics(), batch=BATCH, queue=64), leave_seconds=5)
        listener.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        leaving.callback(thread.join)
        leaving.callback(server.leave)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        clients = leaving.enter_context(subprocess.Popen([sys.executable, "-m", __spec__.name, address], text=True,
                                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        prompts = prompts_of(folder, serving.engine, PROMPT, 0)

        def bare(count: int) -> int:
            return serving.engine.generate_tokens(prompts[:count], NEW)[1].generated_tokens

        def served(count: int, stream: bool) -> int:
            assert clients.stdin is not None
            assert clients.stdout is not None
            clients.stdin.write(json.dumps([prompts[:count], stream]) + "\n")
            clients.stdin.flush()
            return int(clients.stdout.readline())

        print(f"{PROMPT} tokens in, {NEW} out; best of {ROUNDS}\n{'':<22}{'tokens/s':>10}{'ratio':>8}"
              f"{'tokens/CPU s':>14}{'ratio':>8}")
        for count in CLIENTS:
            ways = {"bare engine": lambda: bare(count), "whole answers": lambda: served(count, False),  # noqa: B023
                    "streams": lambda: served(count, True)}  # noqa: B023
            rounds = [[best(work) for work in ways.values()] for _ in range(ROUNDS)]
            found = [[max(figures) for figures in zip(*turns, strict=True)] for turns in zip(*rounds, strict=True)]
            floor_wall, floor_cpu = found[0]
            for way, (wall, cpu) in zip(ways, found, strict=True):
                print(f"{count} x {way:<18}{wall:>10.1f}{wall / floor_wall:>8.3f}{cpu:>14.1f}{cpu / floor_cpu:>8.3f}")
    shut_down()


if __name__ == "__main__":
    be_clients(sys.argv[1]) if len(sys.argv) > 1 else main()
