"""A writer that dies, or finds the disk full: the bank is the old one or the new one, and the next writer clears up."""

import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_m3.errors import ArtifactError
from tests.edited_banks import compact, copy_of, delete, digest, open_bank, records


def in_child(do) -> int:
    """Run ``do`` in a forked process; its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        do()
        os._exit(0)
    except BaseException:
        os._exit(7)


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"}


def killed_before_change(number: int, folder: Path, do) -> bool:
    """Run ``do`` in a process that is killed just before its ``number``-th change in ``folder``; false if it ended."""

    def child() -> None:
        count = 0

        def hook(event: str, arguments) -> None:
            nonlocal count
            writes = event == "open" and arguments[2] and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (event in CHANGES or writes) and str(folder) in str(arguments[0]):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        do()

    status = in_child(child)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


@pytest.mark.parametrize("what", ["update", "compact", "delete"])
def test_killed_before_any_change_it_is_the_old_bank_or_the_new(built, updated, edited, run, loaded, tmp_path, what):
    from mpi4py import MPI

    from megatron_m3.memory.update import update_bank

    def do(bank):
        if what == "update":
            update_bank(bank, edited, run, MPI.COMM_SELF, lambda path: loaded)
        elif what == "compact":
            compact(bank)
        else:
            delete(bank, [8])

    start = built / "coded" if what == "update" else updated / "updated_coded"
    done = tmp_path / "done"
    shutil.copytree(start, done)
    do(done)
    old, new, wanted = records(start), records(done), digest(done)
    seen = set()
    for number in range(1, 1000):
        bank = tmp_path / f"bank_{number}"
        shutil.copytree(start, bank)
        was_killed = killed_before_change(number, bank, lambda: do(bank))  # noqa: B023
        found = open_bank(bank).hash
        assert found in (open_bank(start).hash, open_bank(done).hash)
        assert np.array_equal(records(bank), old if found == open_bank(start).hash else new)
        seen.add(found)
        do(bank)
        assert digest(bank) == wanted
        shutil.rmtree(bank)
        if not was_killed:
            break
    assert len(seen) == 2
    assert number > 5


def test_killed_at_random_again_and_again_it_gets_done(updated, tmp_path):
    bank, done = tmp_path / "bank", tmp_path / "done"
    for folder in (bank, done):
        shutil.copytree(updated / "updated_coded", folder)
    start = time.monotonic()
    compact(done)
    length, old = time.monotonic() - start, records(updated / "updated_coded")
    draw, kills = random.Random(1), 0
    while open_bank(bank).settings.edits and kills < 100:
        child = os.fork()
        if not child:
            os.close(2)
            compact(bank)
            os._exit(0)
        time.sleep(draw.uniform(0, length * 1.2))
        os.kill(child, signal.SIGKILL)
        kills += os.waitpid(child, 0)[1] == signal.SIGKILL
        assert np.array_equal(records(bank), old)
    assert kills
    compact(bank)
    assert digest(bank) == digest(done)


def test_a_full_disk_leaves_the_bank_as_it_was(updated, tmp_path):
    """The limit on file size stands for the full disk."""
    bank = copy_of(updated / "updated_coded", tmp_path)
    before = digest(bank)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        with pytest.raises(OSError, match="File too large") as error:
            compact(bank)
        assert "shard_" in str(error.value.filename)

    assert in_child(limited) == 0
    after = digest(bank)
    assert {name: after[name] for name in before} == before
    assert all(name.endswith(".json") for name in after.keys() - before.keys())
    compact(bank)
    assert "folded" in next(iter(open_bank(bank, check=True).places.shards))


def test_a_writer_that_stood_still_does_not_undo_what_another_did(built, tmp_path):
    from megatron_m3.memory.editing import BankWriter

    bank = copy_of(built / "coded", tmp_path)
    with BankWriter(bank, "asleep") as asleep:
        asleep.lock._stop.set()
        asleep.lock._beat.join()
        asleep.lock._write(0)
        delete(bank, [8])
        after = digest(bank)
        with pytest.raises(ArtifactError, match="another process took the lock"):
            asleep.commit(asleep.bank.settings, asleep.bank.manifest.files)
        assert digest(bank) == after
    with BankWriter(bank, "late") as late:
        late.lock.path.rename(tmp_path / "aside")
        delete(bank, [9])
        (tmp_path / "aside").rename(late.lock.path)
        after = digest(bank)
        with pytest.raises(ArtifactError, match="another process changed the bank meanwhile"):
            late.commit(late.bank.settings, late.bank.manifest.files)
        assert digest(bank) == after
