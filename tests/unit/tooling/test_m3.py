"""The ``m3`` command: lists its jobs at once, runs them by name, and answers mistakes in one line."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from launch.m3 import JOBS, Job, find_job, main, overview
from megatron_m3.errors import ConfigError, M3Error, exit_on_user_error
from tests.launcher import run_command, run_module

ALL_JOBS = [job for jobs in JOBS.values() for job in jobs]
HEAVY = ("torch", "faiss", "transformers", "megatron", "matplotlib", "pyarrow")


def test_the_overview_lists_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for job in ALL_JOBS:
        assert any(line.startswith(f"  m3 {' '.join(job.words)} ") and job.summary in line for line in lines)
    assert {f"{group}:" for group in JOBS} | {"Getting started:"} <= set(lines)
    assert max(map(len, lines)) <= 100


def test_no_arguments_show_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert capsys.readouterr().out == overview()


@pytest.mark.parametrize("argv", [["bank"], ["bank", "--help"], ["bank", "-h"]])
def test_an_area_lists_its_own_jobs(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(argv)
    out = capsys.readouterr().out
    assert "m3 bank build" in out
    assert "m3 data" not in out


@pytest.mark.parametrize(("argv", "hint"), [
    (["pretain"], "did you mean pretrain?"),
    (["tokenize"], "did you mean data tokenize?"),
    (["data", "tokenise"], "data tokenize"),
    (["bank", "biuld"], "did you mean bank build?"),
    (["zzz"], "unknown job; `m3 --help`"),
])
def test_unknown_jobs_are_answered_with_the_closest(argv: list[str], hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_job(argv)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_is_light() -> None:
    """No heavy import for the overview, nor for any job's own help, which exists for every job."""
    script = f"""
import contextlib, io, json, sys
from launch.m3 import main
main(["--help"])
heavy = {{"overview": [name for name in {HEAVY} if name in sys.modules]}}
for words in {[list(job.words) for job in ALL_JOBS]}:
    before = set(sys.modules)
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            main([*words, "--help"])
        except SystemExit as stop:
            assert not stop.code, words
    assert "usage" in text.getvalue().lower(), words
    heavy[" ".join(words)] = [name for name in {HEAVY} if name in set(sys.modules) - before]
print("HEAVY", json.dumps({{job: names for job, names in heavy.items() if names}}))
"""
    done = run_command([sys.executable, "-c", script])
    assert json.loads(done.stdout.split("HEAVY ")[1]) == {}


@pytest.mark.parametrize("job", ALL_JOBS, ids=lambda job: "-".join(job.words))
def test_every_job_has_its_module(job: Job) -> None:
    assert importlib.util.find_spec(job.module)


def test_a_job_runs_with_the_words_that_follow(capsys: pytest.CaptureFixture[str]) -> None:
    main(["cost", "--recipe", "tiny", "--references", "7"])
    assert "Memory bank of 7 references" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["pretian"], ["cost", "--recipe", "m9"], ["cost", "--speed", "1"],
                                       ["cost", "--global-batch", "0"]])
def test_a_mistake_ends_in_one_line_and_status_2(arguments: list[str]) -> None:
    done = run_module("launch.m3", arguments, expect=2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("error", "line"), [
    (M3Error("data.tokens=x: missing"), "error: data.tokens=x: missing\n"),
    (KeyboardInterrupt(), "error: interrupted\n"),
    (FileNotFoundError(2, "No such file or directory", "corpus.txt"), "error: corpus.txt: No such file or directory\n"),
    (OSError(28, "No space left on device"),
     "error: output: No space left on device; free space or choose another folder\n"),
])
def test_user_errors_become_one_line(error: BaseException, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(job)
    assert caught.value.code == 2
    assert capsys.readouterr().err == line


def test_our_own_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_on_user_error(lambda: 1 / 0)


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    errors = tmp_path / "stderr"
    command = f"{sys.executable} -c 'print(1)' | true; {sys.executable} -m launch.m3 cost --json 2>{errors} | head -n 0"
    run_command(["bash", "-c", command])
    assert errors.read_text() == ""
