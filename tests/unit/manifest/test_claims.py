"""Claims on pieces of work in a folder: one living owner each, and none after its death."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_m3.manifest.claims import Claims
from tests.launcher import ROOT

CLAIM = """
import sys
from pathlib import Path
from megatron_m3.manifest.claims import Claims
with Claims(Path(sys.argv[1])) as claims:
    assert claims.take("a")
    print("taken", flush=True)
    sys.stdin.read()
"""


def test_a_piece_has_one_owner_until_it_is_released(tmp_path):
    folder = tmp_path / "claims"
    with Claims(folder) as mine, Claims(folder) as other:
        assert mine.take("a")
        assert mine.holds("a")
        assert not other.take("a")
        assert not mine.take("a")
        assert other.take("b")
        mine.release("a")
        assert other.take("a")
        assert not mine.holds("a")
        mine.release("a")
        assert other.holds("a")
    assert not folder.exists()


def test_many_at_once_get_every_piece_once(tmp_path):
    taken: list[int] = []

    def take() -> None:
        with Claims(tmp_path / "claims") as claims:
            begin.wait()
            mine = [piece for piece in range(50) if claims.take(str(piece))]
            taken.extend(mine)
            done.wait()

    begin, done = threading.Barrier(8), threading.Barrier(8)
    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(50))


def test_some_come_while_others_go(tmp_path):
    """The last to go removes the folder, which another is just about to enter."""
    def come_and_go(number: int) -> None:
        for _ in range(300):
            with Claims(tmp_path / "claims"):
                pass

    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(come_and_go, range(4)))) == 4
    assert not list(tmp_path.iterdir())


def test_a_dead_process_owns_nothing(tmp_path):
    with Claims(tmp_path / "claims") as claims:
        owner = subprocess.Popen([sys.executable, "-c", CLAIM, str(tmp_path / "claims")], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, cwd=ROOT)
        assert owner.stdout.readline() == b"taken\n"
        assert not claims.take("a")
        owner.send_signal(signal.SIGKILL)
        owner.communicate()
        assert claims.take("a")
        assert claims.holds("a")
        assert len(list((tmp_path / "claims").glob("*.alive"))) == 2
        claims.clear()
        assert len(list((tmp_path / "claims").glob("*.alive"))) == 1
        assert claims.holds("a")
    assert not (tmp_path / "claims").exists()


def test_an_owner_without_signs_of_life_loses_its_piece_and_learns_it(tmp_path):
    with Claims(tmp_path) as slow, Claims(tmp_path, expiry=30) as other:
        assert slow.take("a")
        assert not other.take("a")
        sign = next(path for path in tmp_path.glob("*.alive") if path.stem == slow.owner)
        slow._over.set()  # as if it were stopped
        os.utime(sign, (sign.stat().st_mtime - 31,) * 2)
        assert other.take("a")
        assert not slow.holds("a")
        slow.release("a")
        assert other.holds("a")


@pytest.mark.parametrize("written", ["", "hal"])
def test_an_owner_that_died_before_it_wrote_its_name(tmp_path, written):
    with Claims(tmp_path, expiry=30) as claims:
        path = tmp_path / "a.claim"
        path.write_text(written)
        assert not claims.take("a")
        os.utime(path, (path.stat().st_mtime - 31,) * 2)
        assert claims.take("a")
