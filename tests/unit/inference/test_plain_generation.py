"""Without memories: token for token a plain megatron-core GPT, whatever the batch; sampling that can be repeated."""

import copy
import dataclasses

import pytest
import torch

from megatron_m3.errors import ConfigError
from tests.tiny_model import sentence, tiny_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def engine(loaded):
    from megatron_m3.inference.engine import Engine

    return Engine(loaded)


def plain_gpt(loaded):
    """megatron-core's own GPT, with its local attention and rotary embedding, and the same weights."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_m3.model.gpt import transformer_config
    from megatron_m3.model.layers import RMSNorm

    config = loaded.config
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    submodules = dataclasses.replace(spec.submodules, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm)
    plain = GPTModel(
        transformer_config(config),
        dataclasses.replace(spec, submodules=submodules),
        config.model.padded_vocab_size,
        512,
        position_embedding_type="rope",
        rotary_base=int(config.model.rope_theta),
        share_embeddings_and_output_weights=config.model.tie_embeddings,
    )
    plain.decoder.final_layernorm = RMSNorm(transformer_config(config), config.model.hidden_size)
    missing = plain.load_state_dict(loaded.model.state_dict(), strict=False)
    assert not [name for name in missing.missing_keys + missing.unexpected_keys if "_extra_state" not in name]
    return plain.eval()


@torch.no_grad()
def greedy_by_recomputing(plain, tokens, count, vocab_size):
    tokens = list(tokens)
    for _ in range(count):
        S = len(tokens)
        mask = torch.ones(1, 1, S, S, dtype=torch.bool).triu(1)
        out = plain(torch.tensor([tokens]), torch.arange(S)[None], mask)
        tokens.append(int(out[0, -1, :vocab_size].argmax()))
    return tokens[-count:]


def test_generation_equals_a_plain_megatron_core_gpt_token_for_token(loaded, engine):
    plain, prompts = plain_gpt(loaded), [sentence(1, 9), "", sentence(2, 30)]
    found, statistics = engine.generate(prompts, 20, stop_at_eos=False)
    for prompt, one in zip(prompts, found, strict=True):
        context = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(prompt)]
        assert one.tokens == greedy_by_recomputing(plain, context, 20, loaded.config.model.vocab_size)
        assert one.prompt == prompt
        assert one.text == loaded.tokenizer.decode(one.tokens)
        assert one.chunks == []
    assert statistics.generated_tokens == 60


def test_a_sequence_stops_at_eos_alone(loaded, engine):
    prompts = [sentence(seed, 5 + seed) for seed in range(4)]
    free, _ = engine.generate(prompts, 24, stop_at_eos=False)
    # take for EOS a token that the first sequence generates in the middle
    eos = free[0].tokens[7]
    tokenizer = copy.copy(loaded.tokenizer)
    tokenizer.eos_id = eos
    found, _ = type(engine)(dataclasses.replace(loaded, tokenizer=tokenizer)).generate(prompts, 24)
    for one, unstopped in zip(found, free, strict=True):
        expected = unstopped.tokens[: unstopped.tokens.index(eos)] if eos in unstopped.tokens else unstopped.tokens
        assert one.tokens == expected
        assert one.ended == (eos in unstopped.tokens)


def test_samples_depend_on_seed_and_prompt_and_not_on_the_batch(engine):
    from megatron_m3.inference.sampling import Sampling

    sampling = Sampling(temperature=1.0, top_k=40, top_p=0.95, seed=5)
    prompts = [sentence(seed, 4 + 3 * seed) for seed in range(4)]
    together = [one.tokens for one in engine.generate(prompts, 16, sampling, stop_at_eos=False)[0]]
    alone = [engine.generate([prompt], 16, sampling, stop_at_eos=False)[0][0].tokens for prompt in reversed(prompts)]
    assert together == alone[::-1]
    other = Sampling(temperature=1.0, top_k=40, top_p=0.95, seed=6)
    assert together != [one.tokens for one in engine.generate(prompts, 16, other, stop_at_eos=False)[0]]
    twice = [one.tokens for one in engine.generate(prompts[:1] * 2, 16, sampling, stop_at_eos=False)[0]]
    assert twice[0] == together[0] != twice[1]


def test_sampled_frequencies_are_the_filtered_probabilities():
    from megatron_m3.inference.sampling import Sampling, choose, draws

    logits = torch.tensor([3.0, 1.0, 2.0, -1.0, 0.0])
    count = 4000

    def frequencies(**options):
        drawn = draws(Sampling(temperature=1.5, seed=1, **options), [[0]] * count)
        return torch.bincount(choose(logits.expand(count, 5), drawn), minlength=5) / count

    whole = (logits / 1.5).softmax(-1)
    torch.testing.assert_close(frequencies(), whole, atol=0.03, rtol=0)
    top2 = whole * torch.tensor([1, 0, 1, 0, 0])
    torch.testing.assert_close(frequencies(top_k=2), top2 / top2.sum(), atol=0.03, rtol=0)
    # 0.50 + 0.26 < 0.8 <= 0.50 + 0.26 + 0.13
    top3 = whole * torch.tensor([1, 1, 1, 0, 0])
    torch.testing.assert_close(frequencies(top_p=0.8), top3 / top3.sum(), atol=0.03, rtol=0)
    assert frequencies(top_k=4, top_p=1e-9)[0] == 1
    hottest = draws(Sampling(temperature=10**40, seed=1), [[0]] * count)
    even = torch.bincount(choose(logits.expand(count, 5), hottest), minlength=5) / count
    torch.testing.assert_close(even, torch.full((5,), 0.2), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_sampling_is_refused_by_name(options, name):
    from megatron_m3.inference.sampling import Sampling

    with pytest.raises(ConfigError, match=name):
        Sampling(**options)


def test_no_new_tokens_is_refused_and_no_prompts_give_nothing(engine):
    with pytest.raises(ConfigError, match="max_new_tokens"):
        engine.generate(["a"], 0)
    assert engine.generate([], 5)[0] == []
