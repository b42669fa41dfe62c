"""The whole job in small: every command of the demo, and what it leaves."""

import json

import pytest

from tests.launcher import run_module

SMALL = ["--warmup-steps", "3", "--continual-steps", "3", "--train-entries", "1500", "--other-entries", "300",
         "--heldout", "12", "--questions", "12"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_module("launch.m3", ["demo", "--output", str(folder), *SMALL], timeout=600)


def test_it_ends_with_a_table_a_picture_and_a_summary(demo):
    folder, done = demo
    summary = json.loads((folder / "summary.json").read_text())
    for model in summary["models"].values():
        assert set(model["nats_per_token"]) == {"none", "explicit", "shuffled", "text"}
        assert all(0 < score < 20 for score in model["nats_per_token"].values())
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "table.txt").read_text() in done.stdout
    rows = (folder / "run" / "scratch" / "scores_explicit.jsonl").read_text().splitlines()
    scored = [json.loads(line) for line in rows]
    mean = sum(row["nll"] for row in scored) / sum(row["tokens"] for row in scored)
    assert summary["models"]["scratch"]["nats_per_token"]["explicit"] == pytest.approx(mean)


def test_a_real_model_answers_from_memory_what_it_did_not_know(demo):
    folder, _ = demo
    summary = json.loads((folder / "summary.json").read_text())
    scores = summary["models"]["smollm2"]["nats_per_token"]
    assert scores["explicit"] < 0.5 * scores["none"] < 0.6 * scores["shuffled"]
    assert abs(scores["explicit"] - scores["text"]) < 0.5


def test_memories_are_read_and_shown(demo):
    folder, done = demo
    summary = json.loads((folder / "summary.json").read_text())
    scores = summary["models"]["scratch"]["nats_per_token"]
    assert len({round(scores[mode], 6) for mode in ("none", "explicit", "shuffled")}) == 3
    assert summary["models"]["scratch"]["bank"]["references"] > 300
    assert "generated tokens 64-95 read" in done.stdout


def test_a_second_run_does_nothing_twice(demo):
    folder, first = demo
    again = run_module("launch.m3", ["demo", "--output", str(folder), *SMALL], timeout=120)
    assert again.stdout.count("done before") == first.stdout.count("  $ ") == 27
    assert "  $ " not in again.stdout


def test_a_bank_of_another_model_is_refused(demo):
    folder, _ = demo
    run = folder / "run" / "scratch"
    done = run_module("launch.m3", [
        "generate", "--checkpoint", str(run / "warmup"), "--bank", str(run / "bank"), "--references",
        str(run / "references"), "--index", str(run / "index"), "--prompt", "The word",
    ], expect=2)
    assert done.stdout == ""
    assert done.stderr.count("error:") == 1
    assert "checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
