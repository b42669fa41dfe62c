"""Memory heads under tensor parallelism: ranks that hold some of them, or none in a layer, generate as one process."""

import dataclasses
import json

import pytest

from tests.knowledge import build_knowledge
from tests.launcher import run_ranks
from tests.tiny_model import joined_world, tiny_model

HEADS = "0:0,5;1:1,2;2:0,1,2,3,4,5"
"""Of 6: of 3 ranks the second has none in layer 0, the third none in layer 1."""
BANKS = {"some": HEADS, "all": "all"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, a knowledge base and two banks."""
    from launch.m3 import main
    from megatron_m3.model.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("heads")
    with joined_world():
        loaded = tiny_model(folder, memory__layers="0-2", memory__heads=HEADS, model__num_heads="6",
                            model__num_kv_heads="6", model__ffn_size="96", model__vocab_multiple="384")
        data = dataclasses.replace(loaded.config.data, tokenizer=str(folder / "tokenizer"))
        save_checkpoint(folder / "run", 1, [loaded.model], dataclasses.replace(loaded.config, data=data))
        paths = build_knowledge(folder, folder / "tokenizer", count=40, words=10, reference_length=16)
        for name, heads in BANKS.items():
            main(["bank", "build", "--checkpoint", str(folder / "run"), "--references", str(paths["references"]),
                  "--output", str(folder / name), "--codec", "KLT20", "--memory-heads", heads])
    return folder


def generate_alone(folder, bank):
    """What one process generates, which is not what it does without memory."""
    from launch.engine import EngineOptions, build_engine
    from tests.tiny_model import sentence

    options = {"checkpoint": str(folder / "run"), "references": str(folder / "references"),
               "index": str(folder / "index")}
    prompts = [sentence(seed, 9) for seed in range(3)]
    with joined_world():
        engine = build_engine(EngineOptions(**options, bank=str(folder / bank)))
        found, _ = engine.generate(prompts, 20, stop_at_eos=False)
        plain, _ = build_engine(EngineOptions(checkpoint=str(folder / "run"), no_memory=True)).generate(
            prompts, 20, stop_at_eos=False)
    tokens = [one.tokens for one in found]
    assert tokens != [one.tokens for one in plain]
    return tokens


@pytest.mark.parametrize(("bank", "ranks"), [("some", 3), ("all", 2)])
def test_tensor_parallel_ranks_read_their_heads_and_generate_as_one_process(folder, bank, ranks):
    expected = generate_alone(folder, bank)
    run_ranks("tests.distributed.heads_ranks", ranks, [str(folder), bank])
    assert json.loads((folder / "generated.json").read_text()) == expected
