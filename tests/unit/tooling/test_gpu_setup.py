"""`make gpu-setup` with a Python that only notes what it is asked for: it leaves all or nothing."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def make(tmp_path):
    """Runs gpu-setup in a venv that is set up; what was run, and what pip was asked for in all."""
    venv, log = tmp_path / "venv", tmp_path / "asked"
    (venv / "bin").mkdir(parents=True)
    (venv / ".ready").touch()
    python = venv / "bin/python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *requirements-gpu*) exit $FAILS;; esac\n')
    python.chmod(0o755)

    def run(fails=0, toolkit=tmp_path):
        done = subprocess.run(
            ["make", "gpu-setup", f"VENV={venv}", f"WHEELS={tmp_path / 'wheels'}", f"CUDA_HOME={toolkit}"], cwd=ROOT,
            capture_output=True, text=True, env=os.environ | {"FAILS": str(fails)})
        return done, log.read_text() if log.exists() else ""

    return run


def test_what_failed_halfway_is_mended_by_the_next_setup(make, tmp_path):
    """faiss-cpu has been taken away by then, so the venv counts as not set up."""
    assert make(fails=1)[0].returncode
    assert not (tmp_path / "venv/.ready").exists()


def test_what_is_set_up_is_not_set_up_again(make):
    done, asked = make()
    assert done.returncode == 0, done.stderr
    assert "uninstall" in asked
    assert make()[1] == asked


def test_without_a_toolkit_nothing_is_begun(make, tmp_path):
    done, asked = make(toolkit="")
    assert done.returncode
    assert "error: no CUDA toolkit: set CUDA_HOME" in done.stderr
    assert asked == ""
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/complete").touch()
    assert make(toolkit="")[0].returncode == 0
