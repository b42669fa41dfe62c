"""Processes that count apart, as those of two containers of one host do, are not taken for one another."""

import shutil
import subprocess
import sys

import pytest

from megatron_m3.manifest import atomic_folder
from megatron_m3.manifest.claims import Claims
from tests.launcher import ROOT

APART = ("unshare", "--pid", "--fork")
"""Runs a command as process 1 of a space of its own, in which no other process has a number."""
OTHER = """
import contextlib, sys
from pathlib import Path
from megatron_m3.manifest import atomic_folder
from megatron_m3.manifest.claims import Claims
with Claims(Path(sys.argv[1]) / "claims") as claims:
    print("taken" if claims.take("a") else "left")
    claims.clear()
with contextlib.suppress(KeyError), atomic_folder(Path(sys.argv[1]) / "index"):
    raise KeyError
"""
pytestmark = pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*APART, "true"], capture_output=True, check=False).returncode != 0,
    reason="this user may not make a space of processes (unshare --pid)",
)


def test_what_a_living_process_of_another_container_has_stays_its_own(tmp_path):
    with Claims(tmp_path / "claims") as mine, atomic_folder(tmp_path / "index") as half_made:
        assert mine.take("a")
        (half_made / "file").touch()
        done = subprocess.run([*APART, sys.executable, "-c", OTHER, str(tmp_path)], cwd=ROOT, text=True,
                              capture_output=True, check=True)
        assert done.stdout == "left\n"
        assert mine.holds("a")
        assert (tmp_path / "claims" / f"{mine.owner}.alive").exists()
        assert (half_made / "file").exists()
