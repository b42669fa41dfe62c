"""Blocks shared by processes: each is done once, and an error reaches the user."""

import os
import time

import numpy as np
import pytest

from data_tools.shared_work import Workers, share
from megatron_m3.errors import ArtifactError, DataError
from megatron_m3.manifest import BlockFolder
from megatron_m3.manifest.claims import CLAIMS
from megatron_m3.manifest.process import place
from tests.launcher import ended_process


class Write:
    """Writes a block, and notes who did it."""

    def __init__(self, folder, together=1, fails_at=None):
        self.folder, self.together, self.fails_at = folder, together, fails_at

    def __call__(self, index):
        if index == self.fails_at:
            raise DataError(f"block {index} cannot be made")
        (self.folder.folder / f"did_{index}_{os.getpid()}").touch()
        while len({pid for _, pid in doers(self.folder)}) < self.together:  # until so many processes have begun
            time.sleep(0.01)
        self.folder.write(index, {"values": np.arange(index)})


def doers(folder):
    return [path.name.split("_")[1:] for path in folder.folder.glob("did_*")]


def test_blocks_are_done_once_by_several_processes(tmp_path):
    folder = BlockFolder(tmp_path / "blocks", {"kind": "test"})
    with Workers(2) as workers:
        workers.run("test", folder, [1] * 12, "blocks", Write(folder, together=2))
    found = doers(folder)
    assert sorted(int(index) for index, _ in found) == list(range(12))
    assert len({pid for _, pid in found}) == 2
    assert not (folder.folder / CLAIMS).exists()


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
    assert not (folder.folder / CLAIMS).exists()
    with Workers(1) as workers:
        workers.run("test", folder, [1] * 3, "blocks", Write(folder))
    assert not folder.missing(3)


def test_what_a_killed_job_left_half_written_is_cleared_and_nothing_else(tmp_path):
    folder = BlockFolder(tmp_path / "blocks", {"kind": "test"})
    host, dead = place(), ended_process()
    left = [f".{folder.name(1)}.{host}.{dead}.tmp", f".block_000000.json.{host}.{dead}.tmp",
            f".{folder.name(0)}.other.host.{os.getpid()}.tmp"]
    kept = [f".{folder.name(0)}.{host}.{os.getppid()}.tmp", f".manifest.json.other.{dead}.tmp",
            f".{folder.name(2)}.{host}.{dead}.tmp"]
    claims = folder.folder / CLAIMS
    claims.mkdir()
    for path in [*(folder.folder / name for name in [*left, *kept]), claims / f"{host}-{dead}-00000000.alive"]:
        path.touch()
    (claims / "0.claim").write_text(f"{host}-{dead}-00000000")
    with Workers(1) as workers:
        workers.run("test", folder, [1] * 2, "blocks", Write(folder))
    assert sorted(path.name for path in folder.folder.glob(".*")) == sorted(kept)


def test_a_block_that_another_did_and_cleared_up_after_is_no_error(tmp_path):
    folder = BlockFolder(tmp_path / "blocks", {"kind": "test"})

    def loses_the_race(index):
        with folder.writing(index, {}) as path:
            path.touch()
            folder.write(index, {"values": np.zeros(1)})

    assert list(share(folder, 1, loses_the_race)) == [0]
    with pytest.raises(FileNotFoundError):
        list(share(folder, 2, lambda index: (tmp_path / "none").read_text()))


def test_a_block_that_another_writes_meanwhile_counts_as_kept(tmp_path, monkeypatch):
    folder, told = BlockFolder(tmp_path / "blocks", {"kind": "test"}), tmp_path / "nothing_kept"
    monkeypatch.setenv("M3_STANDSTILL", str(told))

    def another(index):
        with pytest.MonkeyPatch.context() as elsewhere:
            elsewhere.delenv("M3_STANDSTILL")
            folder.write(index, {"values": np.zeros(1)})

    for blocks, was_told in ((1, True), (1, False), (2, True)):
        told.touch()
        with Workers(1) as workers:
            workers.run("test", folder, [1] * blocks, "blocks", another)
        assert told.exists() is not was_told


def test_of_two_jobs_that_begin_at_once_one_is_refused(tmp_path, monkeypatch):
    look, others = BlockFolder.is_begun, [{"kind": "other"}]

    def looks_before_another_begins(folder, job):
        found = look(folder, job)
        if others:
            BlockFolder(folder, others.pop())
        return found

    monkeypatch.setattr(BlockFolder, "is_begun", staticmethod(looks_before_another_begins))
    with pytest.raises(ArtifactError, match="made from other inputs or settings"):
        BlockFolder(tmp_path / "blocks", {"kind": "test"})
    assert BlockFolder.is_begun(tmp_path / "blocks", {"kind": "other"})
    assert [path.name for path in (tmp_path / "blocks").iterdir()] == ["job.json"]
