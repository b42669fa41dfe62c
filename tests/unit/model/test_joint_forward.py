"""The joint pass against a plain GPT, against one written from the definitions, and against finite differences."""

import math

import pytest
import torch

from megatron_m3.config import get_recipe, replace_fields

PREFIX = torch.tensor([1, 7, 9])


def tiny(**overrides):
    return replace_fields(get_recipe("tiny"), {name.replace("__", "."): value for name, value in overrides.items()})


def random_batch(config, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    B, S = len(lengths), config.data.sequence_length
    C = S // config.memory.chunk_length

    def draw(*shape):
        return torch.randint(0, config.model.vocab_size, shape, generator=generator)

    return {
        "context": draw(B, S), "labels": draw(B, S),
        "references": draw(B, C, config.memory.reference_length), "reference_lengths": torch.tensor(lengths),
    }


def build(config, std=0.1):
    from megatron_m3.model.gpt import build_model

    model = build_model(replace_fields(config, {"model.init_std": str(std)}))[0]
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def plain_gpt(config, model):
    """megatron-core's own GPT: its local attention and its rotary embedding, with the weights of ``model``."""
    import dataclasses

    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_m3.model.gpt import transformer_config
    from megatron_m3.model.layers import RMSNorm

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    submodules = dataclasses.replace(spec.submodules, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm)
    plain = GPTModel(
        transformer_config(config), dataclasses.replace(spec, submodules=submodules), config.model.padded_vocab_size,
        config.data.sequence_length, position_embedding_type="rope", rotary_base=int(config.model.rope_theta),
        share_embeddings_and_output_weights=config.model.tie_embeddings,
    )
    plain.decoder.final_layernorm = RMSNorm(transformer_config(config), config.model.hidden_size)
    missing = plain.load_state_dict(model.state_dict(), strict=False)
    assert not [name for name in missing.missing_keys + missing.unexpected_keys if "_extra_state" not in name]
    return plain.eval()


@pytest.mark.parametrize("tied", ["false", "true"])
def test_without_memories_it_is_a_plain_megatron_core_gpt(tied):
    from megatron_m3.model.gpt import training_forward

    config = tiny(model__tie_embeddings=tied)
    model = build(config)
    batch = random_batch(config, [[0, 0, 0, 0]] * 2)
    warmup = {name: batch[name] for name in ("context", "labels")}
    ours = training_forward(model, warmup, config, PREFIX)
    S = config.data.sequence_length
    mask = torch.ones(1, 1, S, S, dtype=torch.bool).triu(1)
    theirs = plain_gpt(config, model)(batch["context"], torch.arange(S).expand(2, S), mask, labels=batch["labels"])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class PlainModel:
    """The method written from its definitions, one reference and one query at a time, from the same weights."""

    def __init__(self, config, model):
        self.config, self.weights = config, {name: value.double() for name, value in model.state_dict().items()
                                             if isinstance(value, torch.Tensor)}

    def norm(self, x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config.model.norm_epsilon).sqrt() * self.weights[name]

    def rotate(self, x, position):
        D = x.shape[-1]
        out = x.clone()
        for pair in range(D // 2):
            angle = position * self.config.model.rope_theta ** (-2 * pair / D)
            a, b = x[..., pair], x[..., pair + D // 2]
            out[..., pair] = a * math.cos(angle) - b * math.sin(angle)
            out[..., pair + D // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def qkv(self, x, layer):
        m = self.config.model
        x = self.norm(x, f"decoder.layers.{layer}.input_layernorm.weight")
        mixed = x @ self.weights[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"].T
        groups = mixed.view(len(x), m.num_kv_heads, m.num_heads // m.num_kv_heads + 2, m.head_size)
        return groups[:, :, :-2].reshape(len(x), m.num_heads, m.head_size), groups[:, :, -2], groups[:, :, -1]

    def finish(self, x, attended, layer):
        name = f"decoder.layers.{layer}."
        x = x + attended.reshape(len(x), -1) @ self.weights[name + "self_attention.linear_proj.weight"].T
        hidden = self.norm(x, name + "pre_mlp_layernorm.weight") @ self.weights[name + "mlp.linear_fc1.weight"].T
        gate, up = hidden.chunk(2, -1)
        return x + (torch.nn.functional.silu(gate) * up) @ self.weights[name + "mlp.linear_fc2.weight"].T

    def attend(self, query, keys, values, num_slots=0, blind=()):
        """One position: query [H, D]; keys and values [n, G, D] it may read, the kv heads ``blind`` but the first."""
        repeat = query.shape[0] // keys.shape[1]
        keys, values = keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1)
        scores = torch.einsum("hd,nhd->nh", query, keys) / math.sqrt(query.shape[-1])
        for head in blind:
            scores[:num_slots, head * repeat : (head + 1) * repeat] = -math.inf
        weights = scores.softmax(0)
        return torch.einsum("nh,nhd->hd", weights, values)

    def losses(self, batch, row, prefix):
        """Per-token losses of one sequence that reads its references."""
        config, memory = self.config, self.config.memory
        p, start = len(prefix), len(prefix) + memory.reference_length
        embed = self.weights["embedding.word_embeddings.weight"]
        trunk = embed[torch.cat([prefix, batch["context"][row]])]
        places = [*range(p), *(start + i for i in range(len(trunk) - p))]
        lengths = batch["reference_lengths"][row].tolist()
        references = [embed[ids[:n]] for ids, n in zip(batch["references"][row], lengths, strict=True)]
        for layer in range(config.model.num_layers):
            q, k, v = self.qkv(trunk, layer)
            q, k = (torch.stack([self.rotate(x[i], places[i]) for i in range(len(x))]) for x in (q, k))
            memories = [[] for _ in references]
            for c, reference in enumerate(references):
                if not len(reference):
                    continue
                rq, rk, rv = self.qkv(reference, layer)
                if layer in config.memory_layers:
                    memories[c] = self.keep(rq, rk, rv, p)
                rotated_q, rotated_k = (
                    torch.stack([self.rotate(x[i], p + i) for i in range(len(x))]) for x in (rq, rk)
                )
                attended = [
                    self.attend(rotated_q[i], torch.cat([k[:p], rotated_k[: i + 1]]), torch.cat([v[:p], rv[: i + 1]]))
                    for i in range(len(reference))
                ]
                references[c] = self.finish(reference, torch.stack(attended), layer)
            attended = []
            for i in range(len(trunk)):
                chunk = (i - p) // memory.chunk_length
                read = range(max(0, chunk - memory.window + 1), chunk + 1) if i >= p else ()
                slots = [memories[c] for c in read if memories[c]]
                keys = torch.cat([*(slot[0] for slot in slots), k[: i + 1]])
                values = torch.cat([*(slot[1] for slot in slots), v[: i + 1]])
                readers = config.memory_heads.get(layer, ())
                blind = [head for head in range(config.model.num_kv_heads) if head not in readers]
                attended.append(self.attend(q[i], keys, values, len(keys) - i - 1, blind))
            trunk = self.finish(trunk, torch.stack(attended), layer)
        hidden = self.norm(trunk[p:], "decoder.final_layernorm.weight")
        logits = hidden @ self.weights["output_layer.weight"].T
        return torch.nn.functional.cross_entropy(logits, batch["labels"][row], reduction="none")

    def keep(self, q, k, v, p):
        """Kept keys (rotated) and values [K, G, D]; each key-value head keeps its own tokens, in order of position."""
        n, H, D = q.shape
        G = k.shape[1]
        kept = min(self.config.memory.num_kept_tokens, n)
        keys, values = torch.empty(kept, G, D, dtype=q.dtype), torch.empty(kept, G, D, dtype=q.dtype)
        for g in range(G):
            weight = sum(
                (q[:, h] @ k[:, g].T / math.sqrt(D)).softmax(-1).sum(0) for h in range(g * H // G, (g + 1) * H // G)
            )
            chosen = sorted(sorted(range(n), key=lambda j: -float(weight[j]))[:kept])
            keys[:, g] = torch.stack([self.rotate(k[j, g], p + j) for j in chosen])
            values[:, g] = v[chosen, g]
        return keys, values


@pytest.mark.parametrize(("layers", "heads"), [("0-1", "all"), ("1,3", "all"), ("all", "all"), ("1,3", "1:1;3:0,1")])
@pytest.mark.parametrize("tokens", ["4", "all"])
def test_joint_pass_equals_the_method_written_from_its_definitions(layers, heads, tokens):
    from megatron_m3.model.gpt import training_forward

    config = tiny(memory__layers=layers, memory__heads=heads, memory__tokens=tokens, training__stage="continual")
    model = build(config)
    batch = random_batch(config, [[16, 0, 9, 2], [3, 16, 16, 1]])
    ours = training_forward(model, batch, config, PREFIX)
    plain = PlainModel(config, model)
    for row in range(2):
        torch.testing.assert_close(ours[row].double(), plain.losses(batch, row, PREFIX), rtol=1e-4, atol=1e-4)


def test_reading_memories_changes_the_loss_and_missing_references_do_not():
    from megatron_m3.model.gpt import training_forward

    config = tiny(training__stage="continual")
    model = build(config)
    batch = random_batch(config, [[16, 0, 9, 2]])
    before = training_forward(model, batch, config, PREFIX)
    batch["references"][0, 1] = 5
    batch["references"][0, 2, 9:] = 5
    torch.testing.assert_close(training_forward(model, batch, config, PREFIX), before)
    batch["references"][0, 2, 3] = 5
    after = training_forward(model, batch, config, PREFIX)
    torch.testing.assert_close(after[:, :16], before[:, :16])
    assert (after[:, 16:] - before[:, 16:]).abs().max() > 1e-4


def test_references_without_a_place_for_every_chunk_are_read_as_with_one():
    from megatron_m3.model.gpt import training_forward

    config = tiny(training__stage="continual")
    model = build(config)
    batch = random_batch(config, [[0, 16, 0, 9], [7, 0, 0, 0]])
    expected = training_forward(model, batch, config, PREFIX)
    chunks = torch.tensor([[3, 1], [0, 2]])
    fewer = batch | {"references": batch["references"].gather(1, chunks[..., None].expand(-1, -1, 16)),
                     "reference_lengths": batch["reference_lengths"].gather(1, chunks),
                     "chunk_references": torch.tensor([[-1, 1, -1, 0], [2, -1, 3, -1]])}
    torch.testing.assert_close(training_forward(model, fewer, config, PREFIX), expected)
    moved = fewer | {"chunk_references": torch.tensor([[1, -1, -1, 0], [2, -1, 3, -1]])}
    assert (training_forward(model, moved, config, PREFIX) - expected)[0].abs().max() > 1e-4


def test_the_kept_tokens_of_a_step_stand_for_those_of_the_settings():
    from megatron_m3.model.gpt import training_forward

    config = tiny(training__stage="continual")
    model, batch = build(config), random_batch(config, [[16, 0, 9, 2]])
    losses = [training_forward(model, batch, config, PREFIX, kept) for kept in (None, 4, 7)]
    seven = training_forward(model, batch, tiny(training__stage="continual", memory__tokens="7"), PREFIX)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[2], seven)
    assert not torch.equal(losses[0], seven)


def test_a_pass_without_gradients_leaves_later_ones_as_they_are():
    from megatron_m3.model.gpt import training_forward
    from megatron_m3.model.layout import _table

    config = tiny(training__stage="continual")
    model, batch = build(config), random_batch(config, [[16, 0, 9, 2]])
    _table.cache_clear()
    with torch.inference_mode():
        evaluated = training_forward(model, batch, config, PREFIX).mean()
    trained = training_forward(model, batch, config, PREFIX).mean()
    trained.backward()
    assert float(evaluated) == float(trained)


def test_what_attention_keeps_is_not_a_view_of_the_whole_projection():
    from megatron_m3.model.layout import JointLayout

    config = tiny(training__stage="continual")
    layout = JointLayout(config=config, prefix_length=3, context_length=32, reference_lengths_BN=torch.full((1, 4), 16))
    projected = torch.randn(4 * 16 + 35, 1, 2, 4, 16)  # two query heads, the key and the value of each key-value head
    query, key, value = projected[:, :, :, :2].flatten(2, 3), projected[:, :, :, 2], projected[:, :, :, 3]
    for part in layout.rotated(64, query, key, value)[1]:
        heads = 4 if part.shape[2] == 4 else 2
        assert part.untyped_storage().nbytes() == (4 * 16 + 35) * heads * 16 * 4


def test_gradients_flow_through_references():
    """Finite differences: tokens that stand only in references move the loss through the memories alone."""
    from megatron_m3.model.gpt import training_forward

    config = tiny(training__stage="continual", model__num_layers="2", memory__tokens="all")
    model = build(config, std=0.3).double()
    batch = random_batch(config, [[16, 16, 12, 7]])
    for name in ("context", "labels"):
        batch[name] %= 256
    batch["references"] = batch["references"] % 256 + 256
    embedding = model.embedding.word_embeddings.weight
    training_forward(model, batch, config, PREFIX).mean().backward()
    gradient = embedding.grad.clone()
    in_references = batch["references"][0, 0, :3].tolist()
    assert gradient[in_references].abs().max() > 1e-6
    step = 1e-3
    for token in in_references:
        index = int(gradient[token].abs().argmax())
        moved = []
        for sign in (1, -1):
            with torch.no_grad():
                embedding[token, index] += sign * step
                moved.append(training_forward(model, batch, config, PREFIX).double().mean().item())
                embedding[token, index] -= sign * step
        assert math.isclose((moved[0] - moved[1]) / (2 * step), float(gradient[token, index]), rel_tol=5e-3)


def test_initial_weights_follow_the_seed():
    first, again = (dict(build(tiny()).named_parameters()) for _ in range(2))
    other = dict(build(tiny(training__seed="7")).named_parameters())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
