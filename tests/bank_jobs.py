"""Bank builds of tests: inputs of a tiny model, the command line of a job, and what it wrote."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.knowledge import build_knowledge
from tests.launcher import ROOT, run_command
from tests.tiny_model import joined_world, tiny_model

NUM_REFERENCES = 600
JOB = ("block-size", "4", "codec-sample", "400")
"""Many small shards, so that there is time to interrupt a build between two of them."""
NUM_SHARDS = 150


def make_inputs(folder: Path) -> None:
    """A checkpoint ``run`` and a knowledge base ``references``."""
    from megatron_m3.model.checkpoint import save_checkpoint

    with joined_world():
        loaded = tiny_model(folder)
        data = dataclasses.replace(loaded.config.data, tokenizer=str(folder / "tokenizer"))
        save_checkpoint(folder / "run", 1, [loaded.model], dataclasses.replace(loaded.config, data=data))
    build_knowledge(folder, folder / "tokenizer", count=NUM_REFERENCES, words=7, reference_length=16)


def words_of(inputs: Path, output: Path, *more: str) -> list[str]:
    """Options of a job; ``more`` are names and values."""
    options = {"checkpoint": inputs / "run", "references": inputs / "references", "output": output} | dict(
        zip(more[::2], more[1::2], strict=True)
    )
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def command(inputs: Path, output: Path, ranks: int, *more: str) -> list[str]:
    """The job under mpiexec, or for 0 ranks a process without it."""
    job = [sys.executable, "-m", "launch.build_bank", *words_of(inputs, output, *more)]
    return [str(Path(sys.executable).with_name("mpiexec")), "-n", str(ranks), *job] if ranks else job


def build(inputs: Path, output: Path, ranks: int, *more: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a job to its end."""
    return run_command(command(inputs, output, ranks, *more), timeout=240, expect=expect)


def build_here(inputs: Path, output: Path, *more: str) -> None:
    """The same job in this process."""
    from launch.build_bank import main

    with joined_world():
        main(words_of(inputs, output, *more))


@contextmanager
def started(inputs: Path, output: Path, ranks: int, *more: str) -> Iterator[subprocess.Popen]:
    """A job that runs meanwhile; what is left of it is killed."""
    job = subprocess.Popen(command(inputs, output, ranks, *more), cwd=ROOT, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        yield job
    finally:
        family = [*ranks_of(job), *([psutil.Process(job.pid)] if job.poll() is None else [])]
        for process in family:
            process.kill()
        job.wait(60)


def ranks_of(job: subprocess.Popen) -> list[psutil.Process]:
    """The living ranks of a job under mpiexec."""
    try:
        return [child for child in psutil.Process(job.pid).children(recursive=True)
                if child.is_running() and "launch.build_bank" in child.cmdline() and "python" in child.name()]
    except psutil.NoSuchProcess:
        return []


def finished(output: Path) -> dict[str, int]:
    """Times of the finished shards: those with a record beside them."""
    return {path.stem: path.with_suffix(".bin").stat().st_mtime_ns for path in output.glob("shard_*.json")}


def claimed(output: Path) -> set[str]:
    """Shards that a process has claimed."""
    return {path.stem for path in output.glob(".claims/shard_*.claim")}


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def wait_until(condition: Callable[[], object], timeout: float = 120) -> None:
    """Wait for a condition, looking often."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
