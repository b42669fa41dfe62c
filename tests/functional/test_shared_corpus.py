"""tokenize and references over blocks of a corpus: the same bytes however many share the work, or are killed at it."""

import gzip
import json
import signal
import subprocess
import sys
import time

import pytest

from data_tools import references, tokenize
from data_tools.pieces import LineCount
from megatron_m3.data import TokenStore
from megatron_m3.errors import ArtifactError, DataError
from megatron_m3.references import ReferenceStore
from megatron_m3.tokenizer import train_tokenizer
from tests.launcher import ROOT

JOBS = {"tokenize": tokenize, "references": references}
STORES = {"tokenize": TokenStore, "references": ReferenceStore}


def text_of(number):
    return f"Document {number}: the word means that which is perceived.\n" + "Of it more is known. " * (number % 70)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A plain file of three blocks, whose documents are called after their lines, some of them bad; and small ones."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": text_of(number)}) if number % 500 else "{bad" for number in range(1, 2401)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "b.txt").write_text("\n\n".join(map(text_of, range(40))))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b'{"id": "z", "text": "last"}\n[]\n'))
    train_tokenizer(map(text_of, range(200)), 500, folder / "tokenizer")
    return folder


def options_of(corpus, output):
    return {"input": (str(corpus),), "tokenizer": str(corpus / "tokenizer"), "output": str(output)}


def contents(folder):
    assert not (folder / "stages").exists()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(job, corpus, output):
    command = [sys.executable, "-m", "launch.m3", "data", job, "--input", str(corpus), "--tokenizer",
               str(corpus / "tokenizer"), "--output", str(output), "--block-megabytes", "1"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("job", JOBS)
def test_the_bytes_do_not_depend_on_who_shares_the_work_or_is_killed(corpus, tmp_path, job):
    run, options = JOBS[job].run, JOBS[job].Options
    run(options(**options_of(corpus, tmp_path / "alone")))
    alone = contents(tmp_path / "alone")
    assert json.loads(alone["counts.json"])["documents"] == 2396 + 40 + 1
    assert alone["skipped.jsonl"].count(b"\n") == 5

    killed = start(job, corpus, tmp_path / "killed")
    while not list(tmp_path.glob("killed/stages/rows/block_*.json")):
        assert killed.poll() is None
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    killed.stderr.close()
    with pytest.raises(ArtifactError, match="unfinished"):
        STORES[job].open(tmp_path / "killed")
    processes = [start(job, corpus, tmp_path / "killed") for _ in range(2)]
    for process in processes:
        assert "error" not in process.communicate()[1]
        assert process.returncode == 0
    assert contents(tmp_path / "killed") == alone

    run(options(**options_of(corpus, tmp_path / "workers"), workers=2, block_megabytes=1))
    assert contents(tmp_path / "workers") == alone

    (tmp_path / "alone" / "stages").mkdir()  # as of a process that was killed when all but the clearing was done
    run(options(**options_of(corpus, tmp_path / "alone")))
    assert contents(tmp_path / "alone") == alone


def test_lines_before_a_place_are_counted_once(tmp_path):
    data = b"".join(b"x" * (number * 37 % 90) + b"\n" for number in range(60_000))
    (tmp_path / "a").write_bytes(data)
    count = LineCount()
    for place in (0, 5, 1 << 20, (1 << 20) + 7, len(data), 3):
        assert count.before(tmp_path / "a", place) == data[:place].count(b"\n")


@pytest.mark.parametrize("job", JOBS)
def test_a_file_that_is_damaged_in_the_middle_is_refused_by_name(corpus, tmp_path, job):
    whole = gzip.compress("".join(json.dumps({"text": text_of(number)}) + "\n" for number in range(900)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    options = options_of(corpus, tmp_path / "out") | {"input": (str(tmp_path / "a.jsonl.gz"),)}
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: damaged gzip file"):
        JOBS[job].run(JOBS[job].Options(**options))
    assert not (tmp_path / "out" / "manifest.json").exists()
