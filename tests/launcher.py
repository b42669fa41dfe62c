"""Start real processes for tests: ranks by torchrun, or one command, with their output in the failure message."""

import os
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    """A TCP port that is free now, outside the range from which the system gives ports to others meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) != 0:
                return port


def ended_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def run_command(arguments: Sequence[str], *, timeout: float = 300, env: dict[str, str] | None = None,
                expect: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository root, one thread a process; fail with its output unless it exits ``expect``."""
    modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    merged = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": modules} | (env or {})
    done = subprocess.run(arguments, cwd=ROOT, env=merged, text=True, capture_output=True, timeout=timeout, check=False)
    if expect is not None and done.returncode != expect:
        output = f"{done.stdout}\n{done.stderr}"
        raise AssertionError(f"{' '.join(arguments)} exited {done.returncode}, not {expect}\n{output}")
    return done


def run_ranks(module: str, ranks: int, arguments: Sequence[str] = (), *, timeout: float = 300,
              env: dict[str, str] | None = None, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module`` on ``ranks`` processes under torchrun over gloo on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
               "--master-addr", "127.0.0.1", "--master-port", str(free_port()), "-m", module, *arguments]
    return run_command(command, timeout=timeout, env=env, expect=expect)


def run_module(module: str, arguments: Sequence[str] = (), *, timeout: float = 300, env: dict[str, str] | None = None,
               expect: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module`` in one process."""
    return run_command([sys.executable, "-m", module, *arguments], timeout=timeout, env=env, expect=expect)
