"""Blocks shared by processes: each is done once, and an error reaches the user."""

import os
import time

import numpy as np
import pytest

from data_tools.shared_work import Workers, share
from megatron_m3.errors import DataError
from megatron_m3.manifest import BlockFolder
from megatron_m3.manifest.claims import CLAIMS


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


def test_blocks_are_done_once_by_several_processes(tmp_path):
    folder = BlockFolder(tmp_path / "blocks", {"kind": "test"})
    with Workers(2) as workers:
        workers.run("test", folder, [1] * 12, "blocks", Write(folder, 0.05))
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
