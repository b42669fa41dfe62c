"""An update with real MPI ranks: any number gives the same bytes, and a second writer is refused by name."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.edited_banks import digest, texts, update
from tests.knowledge import build_knowledge
from tests.launcher import ROOT, run_command
from tests.tiny_model import joined_world, tiny_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A checkpoint, a bank of small shards, and its knowledge base with 200 references added and some deleted."""
    import dataclasses

    from data_tools.edit_references import main as edit
    from launch.build_bank import main as build
    from megatron_m3.model.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("bank_update")
    with joined_world():
        loaded = tiny_model(folder)
        data = dataclasses.replace(loaded.config.data, tokenizer=str(folder / "tokenizer"))
        save_checkpoint(folder / "run", 1, [loaded.model], dataclasses.replace(loaded.config, data=data))
        build_knowledge(folder, folder / "tokenizer", count=100, words=7, reference_length=16)
        build(["--checkpoint", str(folder / "run"), "--references", str(folder / "references"), "--output",
               str(folder / "bank"), "--codec", "none", "--block-size", "4"])
    edit(["--references", str(folder / "references"), "--output", str(folder / "R2"), "--add",
          texts(folder / "add.jsonl", 200, 5000), "--delete", "3,50", "--tokenizer", str(folder / "tokenizer")])
    return folder


def command(inputs, bank, ranks):
    words = ["--bank", bank, "--references", inputs / "R2", "--checkpoint", inputs / "run"]
    mpiexec = Path(sys.executable).with_name("mpiexec")
    return list(map(str, [mpiexec, "-n", ranks, sys.executable, "-m", "launch.update_bank", *words]))


def test_killed_and_refused_it_comes_to_the_same_bytes_with_any_number_of_ranks(inputs, tmp_path, capsys):
    one, bank = tmp_path / "one", tmp_path / "bank"
    for folder in (one, bank):
        shutil.copytree(inputs / "bank", folder)
    with joined_world():
        update(one, inputs / "R2", inputs / "run")
    assert "200 memories encoded, 2 made empty; 300 references" in capsys.readouterr().out
    running = subprocess.Popen(command(inputs, bank, 2), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    wait_until(lambda: any(bank.glob("edit_*/shard_*.json")) or running.poll() is not None)
    refused = None
    if running.poll() is None:
        ranks = [one for one in psutil.Process(running.pid).children(recursive=True) if "python" in one.name()]
        for rank in ranks:
            rank.send_signal(signal.SIGSTOP)
        if (bank / "lock.json").exists():
            from launch.delete_from_bank import main as delete
            from megatron_m3.errors import ArtifactError

            with pytest.raises(ArtifactError, match="locked by `m3 bank update`, process") as refused:
                delete(["--bank", str(bank), "--ids", "1"])
        for rank in ranks:
            rank.kill()
    running.wait(60)
    run_command(command(inputs, bank, 2), timeout=120)
    assert digest(bank) == digest(one)
    assert refused is not None, "the update was done before a second writer came"


def wait_until(condition, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
