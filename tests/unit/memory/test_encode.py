"""Encoding against a loop written from the method (3.2), with dense attention and no shared code but the weights."""

import dataclasses

import pytest
import torch


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(2, 300, (7, 16), generator=generator), torch.tensor([16, 9, 1, 3, 16, 2, 12])


def with_memory(loaded, **fields):
    config = loaded.config
    memory = dataclasses.replace(config.memory, **fields)
    return dataclasses.replace(loaded, config=dataclasses.replace(config, memory=memory))


class DensePlan:
    """Causal attention over everything, by the formula; keeps every layer's queries, keys and values before RoPE."""

    def __init__(self, config):
        self.config, self.seen = config, {}

    def rotate(self, vectors_SHD):
        S, _, D = vectors_SHD.shape
        half = D // 2
        out = torch.empty_like(vectors_SHD)
        for place in range(S):
            for pair in range(half):
                angle = torch.tensor(place * self.config.model.rope_theta ** (-2 * pair / D), dtype=torch.float64)
                first, second = vectors_SHD[place, :, pair], vectors_SHD[place, :, pair + half]
                out[place, :, pair] = first * angle.cos() - second * angle.sin()
                out[place, :, pair + half] = second * angle.cos() + first * angle.sin()
        return out

    def attend(self, layer, query_SBHD, key_SBGD, value_SBGD):
        query, key, value = query_SBHD[:, 0], key_SBGD[:, 0], value_SBGD[:, 0]
        self.seen[layer] = query, key, value
        repeat = query.shape[1] // key.shape[1]
        wide_key, wide_value = (part.repeat_interleave(repeat, 1) for part in (self.rotate(key), value))
        score = torch.einsum("ihd,jhd->hij", self.rotate(query), wide_key) / query.shape[-1] ** 0.5
        score = score.masked_fill(torch.ones_like(score[0]).triu(1).bool(), -torch.inf)
        return torch.einsum("hij,jhd->ihd", score.softmax(-1), wide_value)[:, None]


@torch.no_grad()
def memory_by_definition(loaded, tokens):
    """kv [L, 2, G, kept, D] and positions [L, G, kept] of one reference."""
    from megatron_m3.model.gpt import logits

    config, prefix, plan = loaded.config, loaded.prefix_ids, DensePlan(loaded.config)
    logits(loaded.model, torch.tensor([[*prefix, *tokens]]), plan, config.model.vocab_size)
    kv, positions = [], []
    for layer in config.memory_layers:
        query, key, value = plan.seen[layer]
        rotated, P, groups = plan.rotate(key), len(prefix), query.shape[1] // key.shape[1]
        parts, places = [], []
        for head in range(key.shape[1]):
            weight = torch.zeros(len(tokens))
            for other in range(head * groups, (head + 1) * groups):
                weight += ((query[P:, other] @ key[P:, head].T) / key.shape[-1] ** 0.5).softmax(-1).sum(0)
            kept = weight.topk(min(config.memory.num_kept_tokens, len(tokens))).indices.sort().values
            parts.append(torch.stack([rotated[P + kept, head], value[P + kept, head]]))
            places.append(kept)
        kv.append(torch.stack(parts, 1))
        positions.append(torch.stack(places))
    return torch.stack(kv), torch.stack(positions)


@pytest.mark.parametrize("layers", ["0,2", "3", "0-3"])
def test_a_memory_is_what_the_method_says(loaded, batch, layers):
    from megatron_m3.memory import encode_references

    loaded = with_memory(loaded, layers=layers)
    encoded = encode_references(loaded, *batch)
    for row, (tokens, length) in enumerate(zip(*batch, strict=True)):
        kv, positions = memory_by_definition(loaded, tokens[:length].tolist())
        kept = positions.shape[-1]
        assert int(encoded.num_kept[row]) == kept
        assert encoded.kept_positions(row).tolist() == positions.tolist()
        torch.testing.assert_close(encoded.kv[row, :, :, :, :kept], kv, rtol=2e-5, atol=2e-5)
        assert (encoded.kv[row, :, :, :, kept:] == 0).all()


def test_nothing_above_the_last_memory_layer_is_computed(loaded, batch):
    from megatron_m3.memory import encode_references

    ran = []
    layers = loaded.model.decoder.layers
    hooks = [layer.register_forward_hook(lambda *_, at=at: ran.append(at)) for at, layer in enumerate(layers)]
    hooks += [layers[2].mlp.register_forward_hook(lambda *_: ran.append("mlp")),
              layers[2].self_attention.linear_proj.register_forward_hook(lambda *_: ran.append("projection"))]
    try:
        encode_references(with_memory(loaded, layers="2"), *batch)
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == [0, 1]


def test_a_memory_does_not_depend_on_its_batch_or_padding(loaded, batch):
    from megatron_m3.memory import encode_references

    tokens, lengths = batch
    together = encode_references(loaded, tokens, lengths)
    poisoned = tokens.masked_fill(torch.arange(16) >= lengths[:, None], 299)
    again = encode_references(loaded, poisoned, lengths)
    assert torch.equal(again.kv, together.kv)
    for row in range(len(tokens)):
        alone = encode_references(loaded, tokens[row : row + 1, : lengths[row]], lengths[row : row + 1])
        torch.testing.assert_close(alone.kv[0], together.kv[row], rtol=1e-5, atol=1e-5)
        assert torch.equal(alone.positions[0], together.positions[row])
    small = encode_references(loaded, tokens, lengths, batch_tokens=20)
    torch.testing.assert_close(small.kv, together.kv, rtol=1e-5, atol=1e-5)


def test_all_tokens_may_be_kept(loaded, batch):
    from megatron_m3.memory import encode_references

    encoded = encode_references(with_memory(loaded, tokens="all"), *batch)
    assert encoded.kv.shape[4] == 16
    assert encoded.num_kept.tolist() == batch[1].tolist()
    assert encoded.kept_positions(3).tolist() == [[[0, 1, 2]] * 2] * 2


def test_no_references_give_no_memories(loaded):
    from megatron_m3.memory import encode_references

    none = encode_references(loaded, torch.zeros(0, 16, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    assert none.kv.shape == (0, 2, 2, 2, 4, 16)
    assert len(none) == 0


def test_one_pass_gives_the_memories_of_every_setting(loaded, references):
    from megatron_m3.config import replace_fields
    from megatron_m3.memory import encode_references, encode_variants

    tokens, lengths = references.tokens(range(30))
    exp = {"layers": "1-2", "selection": "exp", "tokens": "2"}
    settings = [{"layers": "0,2"}, {"layers": "3", "tokens": "all"}, exp]
    configs = [replace_fields(loaded.config, {f"memory.{name}": value for name, value in one.items()})
               for one in settings]
    variants = encode_variants(loaded, tokens, lengths, configs, batch_tokens=100)
    for config, variant in zip(configs, variants, strict=True):
        alone = encode_references(dataclasses.replace(loaded, config=config), tokens, lengths, batch_tokens=100)
        assert torch.equal(alone.kv, variant.kv)
        assert torch.equal(alone.positions, variant.positions)
