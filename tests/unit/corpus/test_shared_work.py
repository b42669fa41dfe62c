"""Claims on blocks: one holder at a time, a dead one's claim is taken over, and a live one's is not."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from data_tools import shared_work
from data_tools.shared_work import Claims, Workers, share
from megatron_m3.errors import DataError
from megatron_m3.manifest import BlockFolder


class Write:
    """Writes a block, and notes who did it."""

    def __init__(self, folder, seconds=0.0, fails_at=None):
        self.folder, self.seconds, self.fails_at = folder, seconds, fails_at

    def __call__(self, index):
        if index == self.fails_at:
            raise DataError(f"block {index} cannot be made")
        time.sleep(self.seconds)
        (self.folder.folder / f"did_{index}_{os.getpid()}").touch()
        self.folder.write(index, {"values": np.arange(index)})


def doers(folder):
    return [path.name.split("_")[1:] for path in folder.folder.glob("did_*")]


def test_a_claim_is_held_by_one_and_given_back(tmp_path, monkeypatch):
    one, other = Claims(tmp_path), Claims(tmp_path)
    monkeypatch.setattr(other, "_is_abandoned", lambda path: False)  # this process is both; it is not dead
    with one.hold(3) as mine, other.hold(3) as others, other.hold(4) as another:
        assert mine
        assert not others
        assert another
    with other.hold(3) as others:
        assert others


def test_the_claim_of_a_dead_process_is_taken_over_at_once(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    claims = Claims(tmp_path)
    path = tmp_path / "claims" / "000000"
    path.write_text(f"{os.uname().nodename} {dead.stdout.strip()}")
    with claims.hold(0) as ours:
        assert ours
        assert path.read_text().endswith(f" {os.getpid()}")
    assert not list(path.parent.iterdir())


def test_the_claim_of_another_machine_is_taken_over_only_when_nobody_touches_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_work, "STALE_SECONDS", 0.2)
    claims, path = Claims(tmp_path), tmp_path / "claims" / "000000"
    path.write_text("elsewhere 1")

    def hold():
        with claims.hold(0) as ours:
            return ours

    for beat in range(4):
        os.utime(path, (beat, beat))
        assert not hold()
        time.sleep(0.25)  # longer than a claim may go untouched, but it was touched meanwhile
    assert hold()


def test_a_holder_touches_its_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_work, "BEAT_SECONDS", 0.01)
    with Claims(tmp_path).hold(0):
        path = tmp_path / "claims" / "000000"
        os.utime(path, (1, 1))
        while path.stat().st_mtime == 1:
            time.sleep(0.005)


def test_blocks_are_done_once_by_several_processes(tmp_path):
    folder = BlockFolder(tmp_path / "blocks", {"kind": "test"})
    with Workers(2) as workers:
        workers.run("test", folder, [1] * 12, "blocks", Write(folder, 0.05))
    found = doers(folder)
    assert sorted(int(index) for index, _ in found) == list(range(12))
    assert len({pid for _, pid in found}) == 2
    assert not (folder.folder / "claims").exists()


def test_what_is_done_is_not_done_again(tmp_path):
    folder = BlockFolder(tmp_path / "blocks", {"kind": "test"})
    folder.write(2, {"values": np.zeros(1)})
    assert sorted(share(folder, 4, Write(folder))) == [0, 1, 2, 3]
    assert sorted(index for index, _ in doers(folder)) == ["0", "1", "3"]


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_in_a_worker_reaches_the_user_and_frees_its_claim(tmp_path, count):
    folder = BlockFolder(tmp_path / "blocks", {"kind": "test"})
    with Workers(count) as workers, pytest.raises(DataError, match="block 1 cannot"):
        workers.run("test", folder, [1] * 3, "blocks", Write(folder, fails_at=1))
    assert not list((folder.folder / "claims").glob("*"))
    with Workers(1) as workers:
        workers.run("test", folder, [1] * 3, "blocks", Write(folder))
    assert not folder.missing(3)
