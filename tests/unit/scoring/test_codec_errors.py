"""Errors of codecs, measured in a pass that reads exact memories, beside the same worked out by hand."""

import dataclasses

import pytest
import torch

from megatron_m3.evaluation.examples import Example
from tests.tiny_model import sentence, tiny_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("codec_errors"), std=0.15, memory__tokens="3", memory__layers="1-2")


@pytest.fixture(scope="module")
def lines(loaded):
    encode = loaded.tokenizer.encode
    return [
        Example(line=seed, id=seed, context=encode(sentence(seed, 1 + seed % 4)), target=encode(sentence(seed + 50, 2)),
                references=[encode(sentence(seed + 90 + place, 6)) for place in range(1 + seed % 2)])
        for seed in range(7)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def scorer(loaded, lines):
    from megatron_m3.evaluation.scoring import Scorer

    return Scorer(loaded, "explicit", batch_tokens=100)


def trained(scorer, lines, name):
    from megatron_m3.evaluation.scoring import Scorer

    other = Scorer(scorer.loaded, "explicit")
    other.train_codec(name, other.draw_sample(lines, seed=1))
    return other.codec


def test_errors_fall_with_bytes_and_are_none_where_nothing_is_lost(scorer, lines):
    from megatron_m3.evaluation.codec_errors import CodecErrors, measure_errors
    from megatron_m3.memory.codec import SeparateCodec

    codecs = [trained(scorer, lines, name) for name in ("SQ4", "SQ8")] + [SeparateCodec.none(16)]
    coarse, fine, exact = measure_errors(scorer, codecs, lines)
    assert exact == CodecErrors(keys=0, values=0, outputs=0)
    for name in ("keys", "values", "outputs"):
        assert 0 < 50 * getattr(fine, name) < getattr(coarse, name) < 0.2


def test_errors_are_those_of_each_line_alone(scorer, lines):
    """Padding of shorter lines and other lines' memories do not count."""
    from megatron_m3.evaluation.codec_errors import _OutputErrors, measure_errors
    from megatron_m3.evaluation.scoring import distinct_references, encode_texts

    codec = trained(scorer, lines, "SQ4")
    together = measure_errors(scorer, [codec], lines)[0]
    sums = _OutputErrors(scorer.loaded, 1)
    for line in lines:
        exact = encode_texts(scorer.loaded, distinct_references([line]), [scorer.config])[0]
        sums.count(scorer, [line], exact, [codec.round_trip(exact)])
    assert together.outputs == pytest.approx(sums.shares()[0], rel=1e-4)


def test_output_errors_are_those_of_memory_attention(scorer, lines):
    """With values twice as long, what memories add doubles; the trunk's share stays."""
    from megatron_m3.evaluation.codec_errors import _OutputErrors
    from megatron_m3.evaluation.scoring import distinct_references, encode_texts

    line = lines[0]
    exact = encode_texts(scorer.loaded, distinct_references([line]), [scorer.config])[0]
    shares = []
    for factor in (1.0, 2.0, 3.0):
        kv = exact.kv.clone()
        kv[:, :, 1] *= factor
        sums = _OutputErrors(scorer.loaded, 1)
        sums.count(scorer, [line], exact, [dataclasses.replace(exact, kv=kv)])
        shares += sums.shares()
    assert shares[0] == 0
    assert shares[1] > 0
    assert shares[2] == pytest.approx(4 * shares[1], rel=1e-4)


def test_a_pass_that_compares_gives_the_same_loss(scorer, lines):
    from megatron_m3.evaluation.codec_errors import _ComparingPlan, _OutputErrors
    from megatron_m3.evaluation.scoring import distinct_references, encode_texts, memories_of_lines

    batch = lines[:3]
    exact = encode_texts(scorer.loaded, distinct_references(batch), [scorer.config])[0]
    wrong = memories_of_lines(scorer.config, batch, dataclasses.replace(exact, kv=exact.kv * 2), scorer.device)

    def plan(*args, **named):
        return _ComparingPlan(*args, others=[wrong], lengths_B=torch.full((3,), 99),
                              sums=_OutputErrors(scorer.loaded, 1), **named)

    assert scorer.score_batch(batch, exact, plan=plan) == scorer.score_batch(batch, exact)
