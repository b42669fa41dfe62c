"""Generation by Triton's kernels, and by steps that are repeated as a CUDA graph would; run by test_steps.py."""

import dataclasses

import pytest
import torch

from tests.knowledge import build_knowledge
from tests.tiny_model import joined_world, sentence, tiny_model
from tests.unit.inference.replay import record_steps


@pytest.fixture(scope="module", autouse=True)
def world():
    with joined_world():
        yield


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    from megatron_m3.memory import ColdSource
    from megatron_m3.retrieval import Retriever

    folder = tmp_path_factory.mktemp("steps")
    loaded = tiny_model(folder, memory__layers="0-1", memory__heads="0:1;1:0,1", model__num_layers="2")
    paths = build_knowledge(folder, folder / "tokenizer", count=20, words=10,
                            reference_length=loaded.config.memory.reference_length)
    retriever = Retriever.open(paths["index"], paths["references"], loaded.tokenizer)
    return loaded, retriever, ColdSource(loaded, retriever.references)


def engine_of(parts, attention, memory=True, **options):
    from megatron_m3.inference.engine import Engine

    loaded, *sources = parts
    model = dataclasses.replace(loaded.config.model, attention=attention)
    other = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, model=model))
    return Engine(other, *sources, **options) if memory else Engine(other, **options)


def prompts_of(parts, lengths):
    tokens = parts[0].tokenizer.encode(sentence(7, 60))
    return [tokens[start : start + length] for start, length in enumerate(lengths)]


@pytest.mark.parametrize("memory", [True, False])
def test_tokens_are_those_of_torch(parts, memory, monkeypatch):
    """The first steps are run, the others repeated, also after the recall behind the 8th token."""
    from megatron_m3.ops.cached_attention import triton_backend

    prompts, engine = prompts_of(parts, [0, 11]), engine_of(parts, "triton", memory)
    expected, _ = engine_of(parts, "torch", memory).generate_tokens(prompts, 12, stop_at_eos=False)
    captured = record_steps(monkeypatch, triton_backend.kernels(), ["attend_kernel", "join_kernel"])
    engine.cuda_graphs = True
    found, _ = engine.generate_tokens(prompts, 12, stop_at_eos=False)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert len(captured) == 1


def joined_tokens(engine, prompts, counts):
    """Tokens of sequences of which the last joins the others after 3 steps; each leaves when it has its count."""
    from megatron_m3.inference.generation import Continuation
    from megatron_m3.inference.sampling import Sampling, draws

    whole = [Continuation(prompt=prompt, max_new_tokens=count, draw=draw)
             for prompt, count, draw in zip(prompts, counts, draws(Sampling(), prompts), strict=True)]
    with torch.inference_mode():
        batch, late = (engine.batch(part, stop_at_eos=False) for part in (whole[:-1], whole[-1:]))
        batch.prefill()
        for _ in range(3):
            batch.step()
        late.prefill()
        batch.join(late)
        while batch.goes_on:
            batch.step()
    return [one.tokens for one in whole]


def test_who_joins_or_leaves_ends_a_graph(parts, monkeypatch):
    from megatron_m3.inference import steps
    from megatron_m3.ops.cached_attention import triton_backend

    prompts, counts, engine = prompts_of(parts, [3, 8, 1]), [13, 10, 4], engine_of(parts, "triton")
    expected, _ = engine_of(parts, "torch").generate_tokens(prompts, max(counts), stop_at_eos=False)
    monkeypatch.setattr(steps, "CAPTURE_AFTER", 1)
    captured = record_steps(monkeypatch, triton_backend.kernels(), ["attend_kernel", "join_kernel"])
    engine.cuda_graphs = True
    found = joined_tokens(engine, prompts, counts)
    assert found == [one.tokens[:count] for one, count in zip(expected, counts, strict=True)]
    # two sequences, then three, two, and at last one
    assert len(captured) == 4


def test_without_memory_for_a_graph_steps_go_on(parts, monkeypatch, capsys):
    from megatron_m3.inference import steps
    from megatron_m3.ops.cached_attention import triton_backend

    prompts, engine = prompts_of(parts, [0, 11]), engine_of(parts, "triton")
    expected, _ = engine.generate_tokens(prompts, 12, stop_at_eos=False)
    captured = record_steps(monkeypatch, triton_backend.kernels(), ["attend_kernel", "join_kernel"])
    recorded = steps.capture

    def too_little(step):
        recorded(step)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(steps, "capture", too_little)
    engine.cuda_graphs = True
    found, _ = engine.generate_tokens(prompts, 12, stop_at_eos=False)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert len(captured) == 1
    assert "no memory left for a CUDA graph" in capsys.readouterr().err
