"""m3 generate and m3 score from a checkpoint on disk, as a user runs them."""

import dataclasses
import json

import pytest

from launch.m3 import main
from megatron_m3.errors import M3Error
from tests.knowledge import build_knowledge
from tests.launcher import run_module
from tests.range_server import serve
from tests.tiny_model import joined_world, sentence, tiny_model


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A checkpoint, references, index, prompts and lines to score."""
    from megatron_m3.model.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("generate_score")
    lines = [
        {"id": f"line {seed}", "context": sentence(seed, 3), "target": " " + sentence(seed + 9, 2),
         "references": [sentence(seed + 20, 8), sentence(seed + 40, 4)][: 1 + seed % 2]}
        for seed in range(6)
    ]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = [{"prompt": sentence(seed, 4 + 5 * seed)} for seed in range(3)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    with joined_world():
        loaded = tiny_model(folder, model__max_positions="100")
        data = dataclasses.replace(loaded.config.data, tokenizer=str(folder / "tokenizer"))
        save_checkpoint(folder / "run", 7, [loaded.model], dataclasses.replace(loaded.config, data=data))
        made = build_knowledge(folder, folder / "tokenizer", count=40, words=10, reference_length=16)
        yield made | {name: folder / name for name in ("run", "bank", "in.jsonl", "prompts.jsonl")} | {"folder": folder}


@pytest.fixture(scope="module")
def bank(paths):
    main(["bank", "build", "--checkpoint", str(paths["run"]), "--references", str(paths["references"]),
          "--output", str(paths["folder"] / "bank"), "--codec", "none"])
    return paths["folder"] / "bank"


@pytest.fixture
def run(capsys):
    """Run a command of m3 in this process and give what it printed on stdout and stderr."""

    def run(*words):
        capsys.readouterr()
        main([str(word) for word in words])
        return capsys.readouterr()

    return run


def with_memory(paths):
    return ["--references", paths["references"], "--index", paths["index"]]


def test_warm_and_cold_start_generate_the_same(paths, bank, run):
    options = ["generate", "--checkpoint", paths["run"], *with_memory(paths), "--input", paths["prompts.jsonl"],
               "--max-new-tokens", "20", "--json", "--batch", "1"]
    cold = json.loads(run(*options).out)
    # so small a cache that memories are read from disk again and again
    warm = json.loads(run(*options, "--bank", bank, "--cache-bytes", "8000", "--decoded-bytes", "8000").out)
    assert cold["results"] == warm["results"]
    assert [len(one["chunks"]) > 3 for one in warm["results"]] == [True] * 3
    # a generated chunk may hold no word that retrieves anything
    assert all(
        chunk["references"] for one in warm["results"] for chunk in one["chunks"] if chunk["part"] == "prompt"
    )
    assert warm["statistics"]["cache_misses"] > warm["statistics"]["distinct_references"]
    assert cold["statistics"]["cache_misses"] == cold["statistics"]["distinct_references"]


def test_a_bank_on_a_web_server_and_a_cold_start_keep_records_for_the_next_run(paths, bank, run, tmp_path):
    options = ["generate", "--checkpoint", paths["run"], *with_memory(paths), "--prompt", sentence(2, 9),
               "--max-new-tokens", "30", "--json"]
    expected = json.loads(run(*options, "--bank", bank).out)["results"]
    with serve(bank.parent) as server:
        remote = [*options, "--bank", f"{server.address}/{bank.name}", "--bank-cache", tmp_path / "far",
                  "--prefetch-tokens", "3"]
        assert json.loads(run(*remote).out)["results"] == expected
        server.asked.clear()
        assert json.loads(run(*remote).out)["results"] == expected
        assert not [name for name, _ in server.asked if name.endswith(".bin")]
    for _ in range(2):
        assert json.loads(run(*options, "--bank-cache", tmp_path / "cold").out)["results"] == expected
    assert list((tmp_path / "cold").rglob("*.bin"))


def test_what_was_read_is_shown_and_plain_generation_reads_nothing(paths, run):
    options = ["generate", "--checkpoint", paths["run"], "--prompt", sentence(3, 12), "--max-new-tokens", "12"]
    shown = run(*options, *with_memory(paths))
    assert "prompt tokens 0-7 read" in shown.out
    assert "generated tokens 8-11 read" in shown.out
    assert f"prompt: {sentence(3, 12)}" in shown.out
    assert "tokens/s" in shown.err
    (result,) = json.loads(run(*options, "--no-memory", "--json").out)["results"]
    assert result["chunks"] == []
    assert result["text"] not in shown.out


def test_sampling_repeats_with_its_seed(paths, run):
    options = ["generate", "--checkpoint", paths["run"], "--no-memory", "--prompt", "tun", "--max-new-tokens", "12",
               "--temperature", "1.0", "--json", "--seed"]
    first, again, other = (json.loads(run(*options, seed).out)["results"][0]["tokens"] for seed in (1, 1, 2))
    assert first == again != other


def test_equal_prompts_have_their_own_samples_whatever_their_batch(paths, run, tmp_path):
    (tmp_path / "equal.jsonl").write_text('\ufeff{"prompt": "tun"}\r\n{"prompt": "tun"}\n')
    options = ["generate", "--checkpoint", paths["run"], "--no-memory", "--input", tmp_path / "equal.jsonl", "--json",
               "--max-new-tokens", "12", "--temperature", "1.0", "--batch"]
    alone, together = ([one["tokens"] for one in json.loads(run(*options, size).out)["results"]] for size in (1, 2))
    assert alone == together
    assert alone[0] != alone[1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "prompt"),
        (["--prompt", "a", "--input", "b"], "prompt"),
        (["--prompt", "a"], "references"),
        (["--prompt", "a", "--no-memory", "--index", "b"], "index"),
        (["--prompt", "a", "--no-memory", "--max-overlap", "0"], "max_overlap: not read with --no-memory"),
        (["--prompt", "a", "--references", "b", "--index", "c", "--max-overlap", "-3"], "max_overlap=-3"),
        (["--prompt", "a", "--references", "b", "--index", "c", "--max-overlap", "nan"], "max_overlap=nan"),
        (["--prompt", "a", "--references", "b", "--index", "c", "--cache-bytes", "-5"], "cache_bytes=-5"),
        (["--prompt", "a", "--references", "b", "--index", "c", "--bank", "d", "--codec", "e"], "codec: the bank has"),
        (["--prompt", "a", "--no-memory", "--prefetch-tokens", "3"], "prefetch_tokens: not read with --no-memory"),
        (["--prompt", "a", "--no-memory", "--cuda-graphs", "true"], "cuda_graphs: the model is on cpu"),
        (["--prompt", "a", "--no-memory", "--max-new-tokens", "0"], "max_new_tokens"),
        (["--prompt", "a", "--no-memory", "--max-new-tokens", "1000000000000"], "max_new_tokens=1000000000000"),
        (["--prompt", "a\udcff", "--no-memory"], r"prompt='a\\udcff': not UTF-8"),
        (["--prompt", "a", "--no-memory", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--no-memory", "--temperature", "1e-320"], "temperature=1e-320"),
        (["--prompt", "a", "--no-memory", "--temperature", "nan"], "temperature=nan"),
        (["--prompt", "a", "--no-memory", "--what", "1"], "--what"),
        (["--input", "/nonexistent", "--no-memory"], "no such file"),
    ],
)
def test_a_wrong_generate_command_is_refused_by_name(paths, run, options, reason):
    with pytest.raises(M3Error, match=reason) as caught:
        run("generate", "--checkpoint", paths["run"], *options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("job", ["generate", "score"])
@pytest.mark.parametrize("memory", [False, True])
def test_texts_longer_than_the_model_was_made_for_are_told(paths, run, tmp_path, job, memory):
    from megatron_m3.tokenizer import Tokenizer

    prefix = len(Tokenizer.load(paths["folder"] / "tokenizer").prefix_ids("Reference:"))
    context = 100 - (16 + prefix if memory else 0)
    for beyond in (0, 1):
        text = sentence(3, context + beyond - 3)  # BOS and two more tokens
        if job == "generate":
            told = run(job, "--checkpoint", paths["run"], *(with_memory(paths) if memory else ["--no-memory"]),
                       "--prompt", text, "--max-new-tokens", "2").err
        else:
            line = {"id": 1, "context": text, "target": " " + sentence(4, 2), "references": [sentence(5, 4)]}
            (tmp_path / "in.jsonl").write_text(json.dumps(line))
            told = run(job, "--checkpoint", paths["run"], "--input", tmp_path / "in.jsonl", "--output",
                       tmp_path / "out.jsonl", "--mode", "explicit" if memory else "none").err
        what = f"warning: 1 of 1 texts take up to {context + 1} tokens, more than the {context} that the model was"
        assert (what in told) == bool(beyond), told


def test_bad_prompts_are_named_by_line(paths, run, tmp_path):
    for line in (b"{", b'{"text": "a"}', b'{"prompt": 3}', b'{"prompt": "\xff"}', b"[]", b"[" * 200_000):
        (tmp_path / "bad.jsonl").write_bytes(b'{"prompt": "a"}\n' + line)
        with pytest.raises(M3Error, match=r"bad\.jsonl, line 2"):
            run("generate", "--checkpoint", paths["run"], "--no-memory", "--input", tmp_path / "bad.jsonl")


def scoring(paths, output, *options):
    return ["score", "--checkpoint", paths["run"], "--input", paths["in.jsonl"], "--output", output, *options]


@pytest.mark.parametrize(
    "options",
    [
        ["--mode", "none"],
        ["--mode", "text"],
        ["--mode", "explicit"],
        ["--mode", "shuffled"],
        ["--mode", "explicit", "--memory-layers", "1-3", "--memory-tokens", "all"],
        ["--mode", "explicit", "--codec", "SQ8"],
    ],
)
def test_scores_are_one_line_each_and_the_summary_is_their_mean(paths, run, tmp_path, options):
    output = tmp_path / "scores.jsonl"
    summary = json.loads(run(*scoring(paths, output, *options, "--json")).out)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"line {seed}" for seed in range(6)]
    assert all(set(row) == {"id", "nll", "tokens"} for row in rows)
    assert summary["tokens"] == sum(row["tokens"] for row in rows)
    assert summary["nats_per_token"] == pytest.approx(sum(row["nll"] for row in rows) / summary["tokens"])
    assert (summary["mode"], summary["lines"]) == (options[1], 6)


def test_modes_and_settings_give_different_losses(paths, run, tmp_path):
    losses = set()
    for options in (["none"], ["text"], ["explicit"], ["shuffled"], ["explicit", "--memory-tokens", "all"]):
        summary = json.loads(run(*scoring(paths, tmp_path / "out.jsonl", "--mode", *options, "--json")).out)
        losses.add(round(summary["nll"], 3))
    assert len(losses) == 5


@pytest.mark.parametrize(
    ("options", "line", "reason"),
    [
        (["--mode", "explicit"], '{"id": 1, "context": "a", "target": "b"}', "line 2: references is empty"),
        (["--mode", "explicit"], json.dumps({"id": 1, "context": "", "target": "b", "references": ["ber " * 40]}),
         "the limit is 16"),
        (["--mode", "none"], "{", "line 2: not JSON"),
        (["--mode", "shuffled"], None, "two lines"),
        (["--mode", "none", "--memory-layers", "9"], None, "memory.layers"),
        (["--mode", "explicit", "--codec", "Nonsense"], None, "codec"),
        (["--mode", "explicit", "--codec", "PQ2x8"], None, "give more references in --input, a smaller codec, or auto"),
        (["--mode", "text", "--codec", "auto"], None, "codec=auto: mode text reads no memories"),
        (["--mode", "best"], None, "mode"),
    ],
)
def test_a_wrong_score_command_is_refused_and_writes_nothing(paths, run, tmp_path, options, line, reason):
    wrong, output = tmp_path / "wrong.jsonl", tmp_path / "out.jsonl"
    wrong.write_text(paths["in.jsonl"].read_text().splitlines()[0] + "\n" + (line or ""))
    with pytest.raises(M3Error, match=reason) as caught:
        run(*scoring(paths, output, *options), "--input", wrong)
    assert "\n" not in str(caught.value)
    assert not output.exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("in.jsonl", "is the input file"),
        ("sub/../in.jsonl", "is the input file"),
        ("link.jsonl", "is the input file"),
        ("", "not the name of a file"),
        ("sub", "not the name of a file"),
        ("in.jsonl/out.jsonl", "no folder that can be written"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_checkpoint_is_read(tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text("mine")
    (tmp_path / "link.jsonl").symlink_to("in.jsonl")
    (tmp_path / "sub").mkdir()
    options = ["--checkpoint", "none", "--input", str(tmp_path / "in.jsonl"), "--output", name, "--mode", "none"]
    with pytest.raises(M3Error, match=reason):
        main(["score", *options])
    assert (tmp_path / "in.jsonl").read_text() == "mine"


def test_as_processes_they_say_one_thing_and_exit(paths, tmp_path):
    output = tmp_path / "out.jsonl"
    done = run_module("launch.m3", list(map(str, scoring(paths, output, "--mode", "explicit"))))
    assert "nats per token" in done.stdout
    assert len(output.read_text().splitlines()) == 6
    done = run_module("launch.m3", ["generate", "--checkpoint", str(paths["folder"]), "--no-memory", "--prompt", "a"],
                      expect=2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
