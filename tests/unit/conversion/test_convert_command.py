"""``m3 convert``: words without option names, exit statuses, and what a run takes from a converted checkpoint."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_convert.from_hf import FromOptions, convert
from ckpt_convert.words import parse_words
from launch.m3 import main
from megatron_m3.config import get_recipe
from megatron_m3.errors import M3Error
from megatron_m3.platform import select
from tests.hf_models import make_model
from tests.tiny_model import joined_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    make_model(folder / "hf", "qwen2 tied")
    return folder


@pytest.mark.parametrize("words", [
    ["a", "b", "--dtype", "bf16", "--json"], ["--json", "a", "--dtype", "bf16", "b"],
    ["--dtype=bf16", "a", "--json", "b"], ["--source", "a", "--json=true", "--output", "b", "--dtype", "bf16"],
])
def test_words_may_stand_anywhere(words: list[str]) -> None:
    found = parse_words(FromOptions, words, "m3 convert from-hf", "", ("source", "output"))
    assert found == FromOptions(source="a", output="b", dtype="bf16", json=True)


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_no_word(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_words(FromOptions, [word, "a"], "m3 convert from-hf", "", ("source", "output"))
    assert "--memory-layers" in capsys.readouterr().out


@pytest.mark.parametrize("number", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_copied_and_named(folder: Path, tmp_path: Path, number: float,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "hf", tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    broken = ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    for name in broken:
        weights[name].view(-1)[-1] = number
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    hf, ours, back, two = (str(tmp_path / name) for name in ("hf", "ours", "back", "two"))
    for words in (["from-hf", hf, ours], ["to-hf", ours, back], ["reshard", ours, two, "--tensor", "2"]):
        main(["convert", *words])
        (warning,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
        assert warning.startswith(f"warning: {words[2]}")
        named = re.search(r": (\S+), (\S+), (\S+) hold NaN or infinite numbers", warning)
        assert named
        assert sorted(named.groups()) == broken
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(again[name].isfinite(), weights[name].isfinite()) for name in weights)
    main(["convert", "from-hf", str(folder / "hf"), str(tmp_path / "whole")])
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("words", [["a"], ["a", "b", "c"], ["a", "b", "--experts", "2"]])
def test_too_few_or_unknown_words_are_refused(words: list[str]) -> None:
    with pytest.raises(M3Error):
        parse_words(FromOptions, words, "m3 convert from-hf", "", ("source", "output"))


def test_the_commands_in_a_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, ours, back = (str(folder / name) for name in ("hf", "ours", "back"))
    main(["convert", "from-hf", source, ours, "--memory-layers", "0-1"])
    assert "qwen2, " in capsys.readouterr().out
    main(["convert", "to-hf", ours, back])
    assert "Qwen2ForCausalLM in float32" in capsys.readouterr().out
    main(["convert", "verify", source, back, "--json"])
    assert all(finding["passed"] for finding in json.loads(capsys.readouterr().out))
    main(["convert", "reshard", ours, str(folder / "two"), "--tensor", "2"])
    assert "2 files" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "amount", "failing"), [
    ("model.layers.1.mlp.down_proj.weight", 0.5, {"tensors", "logits"}),
    ("model.layers.0.input_layernorm.weight", 1e-7, {"tensors"}),
])
def test_verify_tells_models_apart(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str,
                                   amount: float, failing: set[str]) -> None:
    convert(FromOptions(source=str(folder / "hf"), output=str(tmp_path / "ours")))
    changed = make_model(tmp_path / "changed", "qwen2 tied")
    tensors = load_file(changed / "model.safetensors")
    tensors[name].view(-1)[3] += amount
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="1"):
        main(["convert", "verify", str(changed), str(tmp_path / "ours"), "--json"])
    found = {finding["check"]: finding["passed"] for finding in json.loads(capsys.readouterr().out)}
    assert {check for check, passed in found.items() if not passed} - {"greedy tokens"} == failing


def test_a_run_starts_from_a_converted_checkpoint(folder: Path, tmp_path: Path) -> None:
    select()
    from ckpt_convert.sources import open_model
    from megatron_m3.model.checkpoint import read_checkpoint
    from megatron_m3.model.weights_hash import weights_hash
    from megatron_m3.training.setup import build_machinery
    from megatron_m3.training.state import start_from

    summary = convert(FromOptions(source=str(folder / "hf"), output=str(tmp_path / "ours")))
    checkpoint = tmp_path / "ours" / "step_0000000"

    config = replace(get_recipe("tiny"), model=open_model(checkpoint).model)
    with joined_world():
        machinery = build_machinery(config, select(), [1])
        assert weights_hash(machinery.models) != summary["weights_hash"]
        start_from(machinery, checkpoint, {"tokenizer": read_checkpoint(checkpoint).inputs["tokenizer"]})
        assert weights_hash(machinery.models) == summary["weights_hash"]
