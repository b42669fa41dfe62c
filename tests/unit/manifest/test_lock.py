"""The lock of a folder: one of many processes has it, others learn who, and a dead owner does not keep it."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from megatron_m3.errors import ArtifactError
from megatron_m3.manifest.lock import NAME, FolderLock, Owner, read_owner
from tests.launcher import ROOT

HOLD = """
import sys, time
from pathlib import Path
from megatron_m3.manifest.lock import FolderLock
with FolderLock(Path(sys.argv[1]), "the other writer", lease=float(sys.argv[2])):
    print("mine", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def held(folder, lease=60.0):
    """The lock, held by another process until its standard input ends."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder), str(lease)], cwd=ROOT, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "mine\n"
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.communicate("\n")


def wait_until(condition, timeout=30.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_writer_is_told_who_has_it_and_until_when(tmp_path):
    with held(tmp_path) as process:
        with pytest.raises(ArtifactError) as error, FolderLock(tmp_path, "me"):
            pass
        said = str(error.value)
        owner = read_owner(tmp_path / NAME)
        until = json.loads((tmp_path / NAME).read_text())["expires_utc"]
        assert f"locked by `the other writer`, process {process.pid} on {os.uname().nodename}, since 2" in said
        assert f"the lock is free at {until}" in said
        assert "\n" not in said
        assert owner.pid == process.pid
    with FolderLock(tmp_path, "me") as lock:
        lock.check()
    assert not list(tmp_path.iterdir())


def test_it_is_renewed_while_its_owner_lives(tmp_path):
    with held(tmp_path, lease=0.6):
        first = read_owner(tmp_path / NAME).expires
        wait_until(lambda: read_owner(tmp_path / NAME).expires > first + 0.6)
        with pytest.raises(ArtifactError, match="locked by"), FolderLock(tmp_path, "me", lease=0.6):
            pass


def test_a_killed_owner_loses_it_at_once(tmp_path, capfd):
    with held(tmp_path) as process:
        process.kill()
        process.wait()
        with FolderLock(tmp_path, "me") as lock:
            lock.check()
        said = capfd.readouterr().err
    assert f"takes over the lock of `the other writer`, process {process.pid}" in said
    assert "its process is gone" in said
    assert len(said.splitlines()) == 1


def test_an_owner_that_stands_still_loses_it_when_it_expires_and_finds_out(tmp_path, capfd):
    with FolderLock(tmp_path, "asleep", lease=0.3) as asleep:
        asleep._stop.set()
        asleep._beat.join()
        wait_until(lambda: time.time() > read_owner(tmp_path / NAME).expires)
        with FolderLock(tmp_path, "me") as mine:
            assert "no sign of life" in capfd.readouterr().err
            asleep._write(time.time() + 1000)
            mine.check()
            assert read_owner(tmp_path / NAME).command == "me"
            with pytest.raises(ArtifactError, match="another process took the lock while this one stood still"):
                asleep.check()
    assert not list(tmp_path.iterdir())


def test_a_stopped_process_loses_it_too(tmp_path, capfd):
    with held(tmp_path, lease=0.5) as process:
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: time.time() > read_owner(tmp_path / NAME).expires)
        with FolderLock(tmp_path, "me") as lock:
            process.send_signal(signal.SIGCONT)
            process.communicate("\n")
            lock.check()


def test_a_process_of_another_machine_is_not_taken_for_dead(tmp_path):
    with FolderLock(tmp_path, "far away"):
        path = tmp_path / NAME
        fields = json.loads(path.read_text()) | {"machine": "another", "pid": 2**22 - 1}
        path.write_text(json.dumps(fields))
        with pytest.raises(ArtifactError, match="`far away`, process 4194303"), FolderLock(tmp_path, "me"):
            pass
        path.write_text(json.dumps(fields | {"expires": time.time() - 1}))
        with FolderLock(tmp_path, "me"):
            pass


def test_a_lock_that_names_nobody_holds_for_its_lease(tmp_path):
    (tmp_path / NAME).touch()
    with pytest.raises(ArtifactError, match="locked by a process that is not named"), FolderLock(tmp_path, "me"):
        pass
    os.utime(tmp_path / NAME, (1, 1))
    with FolderLock(tmp_path, "me"):
        pass


RACE = """
import sys
from pathlib import Path
from megatron_m3.errors import ArtifactError
from megatron_m3.manifest.lock import FolderLock
folder, inside, taken = Path(sys.argv[1]), Path(sys.argv[1]) / "inside", 0
while taken < 40:
    try:
        with FolderLock(folder, "racer") as lock:
            inside.touch(exist_ok=False)
            inside.unlink()
            lock.check()
            taken += 1
    except ArtifactError:
        pass
"""


def test_many_processes_never_have_it_together(tmp_path):
    """Each would find the file of another that is inside, too; a dead owner's lock lies there at the start."""
    with held(tmp_path) as process:
        process.kill()
        process.wait()
    racers = [subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
              for _ in range(4)]
    said = "".join(racer.communicate(timeout=120)[1] for racer in racers)
    assert [racer.returncode for racer in racers] == [0] * 4, said
    assert said.count("takes over the lock") == 1
    assert not list(tmp_path.iterdir())


def test_a_writer_that_was_faster_keeps_its_lock(tmp_path, monkeypatch, capfd):
    """Two find the same dead owner; one takes over just before the other would."""
    with held(tmp_path) as process:
        process.kill()
        process.wait()
    faster = FolderLock(tmp_path, "faster")

    def is_gone(owner):
        monkeypatch.undo()
        faster.__enter__()
        return True

    monkeypatch.setattr(Owner, "is_gone", is_gone)
    with pytest.raises(ArtifactError, match="locked by `faster`"), FolderLock(tmp_path, "me"):
        pass
    faster.check()
    faster.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())
