"""Prefill equals decode equals the training forward, and empty slots are never read."""

import dataclasses

import pytest
import torch

from tests.tiny_model import tiny_model

LENGTHS = [[16, 5, 0, 9], [0, 16, 2, 1], [3, 0, 16, 16]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("reading"), memory__layers="0,2", memory__tokens="4")


@pytest.fixture(scope="module")
def batch(loaded):
    """A training batch: one reference a chunk, some shorter than the kept tokens, some missing."""
    generator = torch.Generator().manual_seed(4)
    config = loaded.config
    B, S, C = len(LENGTHS), config.data.sequence_length, len(LENGTHS[0])

    def draw(*shape):
        return torch.randint(2, config.model.vocab_size, shape, generator=generator)

    return {
        "context": draw(B, S),
        "labels": draw(B, S),
        "references": draw(B, C, config.memory.reference_length),
        "reference_lengths": torch.tensor(LENGTHS),
    }


@pytest.fixture(scope="module")
def memories(loaded, batch):
    """What each chunk reads in training: the references of its own and of the window's earlier chunks."""
    from megatron_m3.inference.reading import ChunkMemories
    from megatron_m3.memory import encode_references

    config, lengths_BC = loaded.config, batch["reference_lengths"]
    B, C = lengths_BC.shape
    there = lengths_BC.flatten() > 0
    encoded = encode_references(
        loaded,
        batch["references"].flatten(0, 1)[there],
        lengths_BC.flatten()[there],
    )
    row_BC = (there.cumsum(0) - 1).view(B, C)
    window = range(config.memory.window)
    chunk_CR = torch.arange(C)[:, None] - torch.tensor(list(window))
    valid_BCR = (chunk_CR >= 0) & (lengths_BC[:, chunk_CR.clamp(min=0)] > 0)
    return ChunkMemories(
        memories=encoded,
        rows_BCR=row_BC[:, chunk_CR.clamp(min=0)].clamp(min=0),
        valid_BCR=valid_BCR,
        layers={layer: place for place, layer in enumerate(config.memory_layers)},
        heads=slice(0, config.model.num_kv_heads),
    )


def make_cache(loaded, memories, batch_size, max_context):
    from megatron_m3.inference.cache import CachePlan, CacheShape
    from megatron_m3.model.rope import Rope

    model, prefix = loaded.config.model, len(loaded.prefix_ids)
    return CachePlan(
        CacheShape(
            batch=batch_size,
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_size=model.head_size,
            prefix_length=prefix,
            context_start=prefix + loaded.config.memory.reference_length,
            max_context=max_context,
            memory_layers=loaded.config.memory_layers,
            num_slots=memories.num_slots,
            dtype=torch.float32,
            device=torch.device("cpu"),
        ),
        Rope(model.head_size, model.rope_theta),
    )


@torch.no_grad()
def read(loaded, context_BS, memories, keep=None, backend="torch"):
    """Logits [B, S, V] of one pass over ``[prefix | context]``."""
    from megatron_m3.inference.reading import ReadingPlan
    from megatron_m3.model.gpt import logits
    from megatron_m3.model.layout import trunk_positions
    from megatron_m3.model.rope import Rope

    config, prefix = loaded.config, torch.tensor(loaded.prefix_ids)
    B, S = context_BS.shape
    plan = ReadingPlan(
        Rope(config.model.head_size, config.model.rope_theta),
        trunk_positions(len(prefix), config.memory.reference_length, S),
        prefix_length=len(prefix),
        chunk_length=config.memory.chunk_length,
        memories=memories,
        keep=keep,
        backend=backend,
    )
    out = logits(loaded.model, torch.cat([prefix.expand(B, -1), context_BS], 1), plan, config.model.vocab_size)
    return out[:, len(prefix) :]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_one_pass_with_stored_memories_is_the_training_forward(loaded, batch, memories, backend):
    from megatron_m3.model.gpt import training_forward

    with torch.no_grad():
        trained = training_forward(loaded.model, batch, loaded.config, torch.tensor(loaded.prefix_ids))
    out = read(loaded, batch["context"], memories, backend=backend)
    losses = torch.nn.functional.cross_entropy(out.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    torch.testing.assert_close(losses.view_as(trained), trained, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("read_by", ["all heads", "some heads", "none"])
@torch.no_grad()
def test_a_known_prefix_is_as_if_it_were_read(loaded, batch, memories, read_by):
    from megatron_m3.inference.reading import ReadingPlan, read_prefix
    from megatron_m3.model.gpt import logits
    from megatron_m3.model.layout import trunk_positions
    from megatron_m3.model.rope import Rope

    config, P, context, kept = loaded.config, len(loaded.prefix_ids), batch["context"], ({}, {})
    some = {next(iter(memories.layers)): torch.arange(config.model.num_kv_heads) > 0}
    read_memories = {"all heads": memories, "some heads": dataclasses.replace(memories, memory_heads=some),
                     "none": None}[read_by]
    whole = read(loaded, context, read_memories, keep=lambda layer, *kv: kept[0].update({layer: kv}))
    rope = Rope(config.model.head_size, config.model.rope_theta)

    def forward(tokens_BS, plan, _=None):
        return logits(loaded.model, tokens_BS, plan, config.model.vocab_size)

    plan = ReadingPlan(
        rope, trunk_positions(P, config.memory.reference_length, context.shape[1])[P:], prefix_length=P,
        chunk_length=config.memory.chunk_length, memories=read_memories,
        prefix=read_prefix(forward, loaded.prefix_ids, rope, context.device, "torch"),
        keep=lambda layer, *kv: kept[1].update({layer: tuple(part.clone() for part in kv)}),
    )
    torch.testing.assert_close(forward(context, plan), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept[1], kept[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_decoding_token_by_token_is_the_one_pass(loaded, batch, memories):
    from megatron_m3.model.gpt import logits

    context, prompts = batch["context"], [5, 16, 1]
    whole = read(loaded, context, memories)
    cache = make_cache(loaded, memories, len(prompts), context.shape[1])
    read(loaded, context[:, : max(prompts)], memories, keep=cache.keep)
    cache.begin(prompts)
    cache.recall(memories.chunk((torch.tensor(prompts) - 1) // 8))
    for _ in range(context.shape[1] - max(prompts)):
        at = torch.tensor(cache.lengths)
        due = [row for row, place in enumerate(cache.lengths) if place % 8 == 0]
        if due:
            new = memories.chunk(at // 8)
            cache.recall(dataclasses.replace(new, rows_BCR=new.rows_BCR[due], valid_BCR=new.valid_BCR[due]), due)
        cache.step()
        rows = torch.arange(len(prompts))
        out = logits(loaded.model, context[rows, at][:, None], cache, loaded.config.model.vocab_size)[:, 0]
        torch.testing.assert_close(out, whole[rows, at], rtol=1e-4, atol=1e-4)


def test_empty_slots_are_never_read(loaded, batch, memories):
    kept = memories.memories.num_kept
    slots = torch.arange(memories.memories.kv.shape[4])
    empty_NK = slots >= kept[:, None]
    assert empty_NK.any()
    poisoned_kv = memories.memories.kv.clone().masked_fill_(empty_NK[:, None, None, None, :, None], float("nan"))
    # and rows that no valid entry names
    nowhere = torch.full_like(poisoned_kv[:1], float("nan"))
    num_kept = torch.cat([kept, slots[-1:].int()])
    poisoned = dataclasses.replace(
        memories,
        memories=dataclasses.replace(memories.memories, kv=torch.cat([poisoned_kv, nowhere]), num_kept=num_kept),
        rows_BCR=memories.rows_BCR.masked_fill(~memories.valid_BCR, len(kept)),
    )
    assert not memories.valid_BCR.all()
    torch.testing.assert_close(
        read(loaded, batch["context"], poisoned), read(loaded, batch["context"], memories), rtol=0, atol=0
    )
    cache = make_cache(loaded, memories, len(LENGTHS), 4)
    cache.recall(poisoned.chunk(torch.zeros(len(LENGTHS), dtype=torch.long)))
    assert all(torch.isfinite(stored).all() for stored in (*cache.keys, *cache.values))
