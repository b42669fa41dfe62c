"""Losses of targets against passes written from the definition, with every mode, and in every batch."""

import dataclasses

import pytest
import torch

from megatron_m3.evaluation.examples import Example
from tests.dense_plan import causal_plan, recompute_plan
from tests.tiny_model import sentence, tiny_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("scoring"), memory__tokens="all", memory__layers="all")


def flat(parts):
    return [token for part in parts for token in part]


def examples(loaded, count=5):
    encode = loaded.tokenizer.encode
    limit = loaded.config.memory.reference_length
    return [
        Example(
            line=seed,
            id=seed,
            context=encode(sentence(seed, seed % 4)),
            target=encode(sentence(seed + 50, 1 + seed % 3)),
            references=[encode(sentence(seed + 100 + place, 9))[: limit - 5 * place] for place in range(1 + seed % 3)],
        )
        for seed in range(count)
    ]


def with_memory(loaded, **settings):
    config = dataclasses.replace(loaded.config, memory=dataclasses.replace(loaded.config.memory, **settings))
    return dataclasses.replace(loaded, config=config)


@torch.no_grad()
def loss_by_definition(loaded, tokens, plan, target):
    from megatron_m3.model.gpt import logits

    out = logits(loaded.model, torch.tensor([tokens]), plan, loaded.config.model.vocab_size)[0].double().log_softmax(-1)
    first = len(tokens) - len(target)
    return -sum(float(out[first + place - 1, token]) for place, token in enumerate(target))


@pytest.mark.parametrize(("layers", "heads"), [("all", "all"), ("0-1", "all"), ("1,3", "all"), ("1,3", "1:0,1;3:1")])
def test_reading_memories_is_attending_to_the_recomputed_references(loaded, layers, heads):
    from megatron_m3.evaluation.scoring import Scorer

    changed = with_memory(loaded, layers=layers, heads=heads)
    lines = examples(loaded)
    for one, score in zip(lines, Scorer(changed, "explicit").score(lines), strict=True):
        context = [loaded.tokenizer.bos_id, *one.context, *one.target]
        tokens = [*loaded.prefix_ids, *flat(one.references), *context]
        plan = recompute_plan(changed.config, len(loaded.prefix_ids), list(map(len, one.references)), len(context))
        assert score.nll == pytest.approx(loss_by_definition(loaded, tokens, plan, one.target), rel=1e-5)
        assert (score.id, score.tokens) == (one.id, len(one.target))


def test_mode_none_is_bos_context_target(loaded):
    from megatron_m3.evaluation.scoring import Scorer

    lines = examples(loaded)
    for one, score in zip(lines, Scorer(loaded, "none").score(lines), strict=True):
        tokens = [loaded.tokenizer.bos_id, *one.context, *one.target]
        plan = causal_plan(loaded.config, len(tokens))
        assert score.nll == pytest.approx(loss_by_definition(loaded, tokens, plan, one.target), rel=1e-5)


def test_mode_text_is_prefix_references_with_newlines_context_target(loaded):
    from megatron_m3.evaluation.scoring import Scorer

    lines = examples(loaded)
    newline = loaded.tokenizer.encode("\n")
    for one, score in zip(lines, Scorer(loaded, "text").score(lines), strict=True):
        references = flat([*reference, *newline] for reference in one.references)
        tokens = [*loaded.tokenizer.prefix_ids("Reference:"), *references, *one.context, *one.target]
        plan = causal_plan(loaded.config, len(tokens))
        assert score.nll == pytest.approx(loss_by_definition(loaded, tokens, plan, one.target), rel=1e-5)


@pytest.mark.parametrize("mode", ["none", "explicit", "text"])
def test_batching_does_not_change_a_loss(loaded, mode):
    from megatron_m3.evaluation.scoring import Scorer

    sparse, lines = with_memory(loaded, tokens="3"), examples(loaded, 12)
    alone = Scorer(sparse, mode, batch_tokens=1).score(lines)
    finished = []
    together = Scorer(sparse, mode, batch_tokens=60).score(lines, finished.append)
    assert [one.id for one in together] == [one.id for one in alone] == list(range(12))
    assert [one.nll for one in together] == pytest.approx([one.nll for one in alone], rel=1e-5)
    assert sum(finished) == 12
    assert 1 < len(finished) < 12


def test_kept_tokens_and_layers_matter(loaded):
    from megatron_m3.evaluation.scoring import Scorer

    lines = examples(loaded)
    losses = {
        (tokens, layers): sum(
            one.nll for one in Scorer(with_memory(loaded, tokens=tokens, layers=layers), "explicit").score(lines)
        )
        for tokens in ("all", "2")
        for layers in ("all", "2")
    }
    assert len({round(loss, 4) for loss in losses.values()}) == 4


def test_a_codec_that_loses_nothing_much_changes_little_and_a_coarse_one_more(loaded):
    from megatron_m3.evaluation.scoring import Scorer

    lines = examples(loaded, 12)
    exact = [one.nll for one in Scorer(loaded, "explicit").score(lines)]

    def error(codec):
        scorer = Scorer(loaded, "explicit")
        scorer.train_codec(codec, scorer.draw_sample(lines, seed=1))
        return max(abs(one.nll - nll) for one, nll in zip(scorer.score(lines), exact, strict=True))

    assert 0 < error("SQ8") < 0.05 < error("PQ2x2")
