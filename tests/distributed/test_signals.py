"""A run that is asked to leave saves, leaves with status 0, and goes on as if nothing had been; a killed one too."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from megatron_m3.manifest import check_files
from megatron_m3.model.checkpoint import list_checkpoints, read_checkpoint
from tests.launcher import ROOT, free_port
from tests.small_data import make_small_data

DEADLINE = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_small_data(tmp_path_factory.mktemp("data"))


@contextmanager
def pretrain(data, output, ranks, **overrides):
    """The real command on ``ranks`` processes, as a launcher starts them; they are killed at the end if still there."""
    options = {f"data.{name}": getattr(data, name) for name in ("tokens", "tokenizer", "references", "neighbours")}
    options |= {"recipe": "tiny", "training.stage": "continual", "training.micro_batch": 1, "training.output": output,
                "schedule.style": "constant", "schedule.warmup_fraction": 0, "logging.peak_tflops": 1,
                "logging.tensorboard": "false"}
    options |= {name.replace("__", "."): value for name, value in overrides.items()}
    command = [sys.executable, "-m", "launch.pretrain", *(f"--{name}={value}" for name, value in options.items())]
    common = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(ranks)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def wait_until(condition, processes):
    """Wait for ``condition``, as long as the processes live."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        for process in processes:
            assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def finish(processes):
    """Status and output of each process."""
    output = [process.communicate(timeout=DEADLINE)[0] for process in processes]
    return [process.returncode for process in processes], output


def records(output):
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def curve(output):
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records(output)]


def test_sigterm_to_one_process_saves_all_and_the_run_goes_on_bit_for_bit(data, tmp_path):
    with pretrain(data, tmp_path / "run", 2, training__steps=100000, checkpoint__every=100000) as processes:
        wait_until(lambda: len(records(tmp_path / "run")) >= 3, processes)
        processes[1].send_signal(signal.SIGTERM)
        codes, output = finish(processes)
    assert codes == [0, 0], output
    step = records(tmp_path / "run")[-1]["step"]
    assert f"saved step {step} in" in output[0]
    assert list_checkpoints(tmp_path / "run")[-1].name == f"step_{step:07d}"
    for name in ("run", "whole"):
        with pretrain(data, tmp_path / name, 2, training__steps=step + 3) as processes:
            codes, output = finish(processes)
        assert codes == [0, 0], output
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert len(curve(tmp_path / "whole")) == step + 3


def test_sigusr1_alone(data, tmp_path):
    with pretrain(data, tmp_path / "run", 1, training__steps=100000, checkpoint__every=100000) as processes:
        wait_until(lambda: len(records(tmp_path / "run")) >= 2, processes)
        processes[0].send_signal(signal.SIGUSR1)
        [code], [output] = finish(processes)
    assert code == 0, output
    assert "SIGUSR1: saved step" in output
    assert "run the same command to go on" in output


def test_killed_run_leaves_only_whole_checkpoints_and_goes_on(data, tmp_path):
    folder = tmp_path / "run"
    with pretrain(data, folder, 1, training__steps=100000, checkpoint__every=1, checkpoint__keep=2) as processes:
        wait_until(lambda: len(records(folder)) >= 4, processes)
        processes[0].kill()
        processes[0].wait()
    found = list_checkpoints(folder)
    assert found
    for checkpoint in found:
        check_files(checkpoint, read_checkpoint(checkpoint), checksums=True)
    step = int(found[-1].name.removeprefix("step_"))
    with pretrain(data, folder, 1, training__steps=step + 1) as processes:
        [code], [output] = finish(processes)
    assert code == 0, output
    assert f"going on after step {step}" in output
    assert [record["step"] for record in records(folder)] == list(range(1, step + 2))
    assert not list(folder.glob(".step_*"))


def test_an_agent_that_waits_for_other_nodes_leaves_when_it_is_asked_to(tmp_path):
    """Its processes have not begun, so that there is none to pass the request on to."""
    port = free_port()
    job = {"SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_JOB_ID": "5", "M3_PROCESSES_PER_NODE": "1",
           "M3_RENDEZVOUS": f"127.0.0.1:{port}", "OMP_NUM_THREADS": "1"}
    options = [f"--{name}={tmp_path}" for name in ("training.output", "data.tokens", "data.tokenizer")]
    with subprocess.Popen([sys.executable, "-m", "launch.node", "--recipe=tiny", *options], cwd=ROOT,
                          env=os.environ | job) as agent, socket.socket() as asked:
        wait_until(lambda: asked.connect_ex(("127.0.0.1", port)) == 0, [])
        agent.send_signal(signal.SIGTERM)
        try:
            assert agent.wait(DEADLINE) == 128 + signal.SIGTERM
        finally:
            agent.kill()
