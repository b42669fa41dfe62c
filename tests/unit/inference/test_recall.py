"""Generation with recall against one that recomputes everything, from the method's words, at every token."""

import dataclasses
import threading

import numpy as np
import pytest
import torch

from megatron_m3.errors import ConfigError
from tests.dense_plan import recompute_plan
from tests.knowledge import build_knowledge
from tests.tiny_model import sentence, tiny_model

NUM_REFERENCES = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recall")


@pytest.fixture(scope="module")
def loaded(folder):
    return tiny_model(folder, memory__tokens="all", memory__layers="0-2")


@pytest.fixture(scope="module")
def retriever(folder, loaded):
    from megatron_m3.retrieval import Retriever

    length = loaded.config.memory.reference_length
    paths = build_knowledge(folder, folder / "tokenizer", count=NUM_REFERENCES, words=10, reference_length=length)
    return Retriever.open(paths["index"], paths["references"], loaded.tokenizer)


def cold(loaded, retriever):
    from megatron_m3.memory import ColdSource

    return ColdSource(loaded, retriever.references)


@pytest.fixture(scope="module")
def engine(loaded, retriever):
    from megatron_m3.inference.engine import Engine

    return Engine(loaded, retriever, cold(loaded, retriever))


def prompts_of(loaded, lengths):
    tokens = loaded.tokenizer.encode(sentence(7, 60))
    return [tokens[start : start + length] for start, length in enumerate(lengths)]


def read_by(position, prompt, generated, length):
    """The tokens that retrieved what a context position reads (3.1): its chunk's, or those of the chunk before it."""
    beyond = position - len(prompt)
    if beyond < 0 or not beyond // length:
        chunks = [prompt[first : first + length] for first in range(0, len(prompt), length)]
        return chunks[min(position // length, len(chunks) - 1)] if chunks else None
    return generated[(beyond // length - 1) * length : beyond // length * length]


@torch.no_grad()
def generate_by_definition(loaded, retriever, prompt, count):
    """Greedy tokens, each from one dense pass over prefix, every reference read so far, and the context."""
    from megatron_m3.model.gpt import logits

    config, generated = loaded.config, []
    for _ in range(count):
        context = [loaded.tokenizer.bos_id, *prompt, *generated]
        reads = []
        for position in range(len(context)):
            query = read_by(position, prompt, generated, config.memory.chunk_length)
            found = retriever.retrieve([query], config.memory.references_per_chunk) if query else None
            reads.append(found.ids[0][found.valid[0]].tolist() if found else [])
        distinct = sorted({id for read in reads for id in read})
        tokens, lengths = retriever.references.tokens(np.array(distinct, dtype=np.int64))
        whole = [*loaded.prefix_ids]
        for row, size in zip(tokens.tolist(), lengths.tolist(), strict=True):
            whole += row[:size]
        whole += context
        plan = recompute_plan(
            config,
            len(loaded.prefix_ids),
            lengths.tolist(),
            len(context),
            lambda position: [distinct.index(id) for id in reads[position]],  # noqa: B023
        )
        out = logits(loaded.model, torch.tensor([whole]), plan, config.model.vocab_size)
        generated.append(int(out[0, -1].argmax()))
    return generated


def test_generation_is_what_the_method_says_at_every_token(loaded, retriever, engine):
    # chunks of 8: an empty prompt, a part of a chunk, one whole, two whole, and two and a part
    prompts = prompts_of(loaded, [0, 5, 8, 16, 19])
    found, _ = engine.generate_tokens(prompts, 18, stop_at_eos=False)
    for prompt, one in zip(prompts, found, strict=True):
        assert one.tokens == generate_by_definition(loaded, retriever, prompt, 18)


def with_heads(loaded, heads):
    memory = dataclasses.replace(loaded.config.memory, heads=heads)
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, memory=memory))


def warm(loaded, retriever, folder):
    """The memories of a bank, which has the memory heads alone."""
    from mpi4py import MPI

    from megatron_m3.config.bank import BankConfig
    from megatron_m3.memory import MemoryBank, WarmSource
    from megatron_m3.memory.build import build_bank

    options = BankConfig(checkpoint="run", references=str(retriever.references.folder), output=str(folder / "bank"),
                         codec="none")
    build_bank(options, MPI.COMM_SELF, lambda path: loaded)
    bank = MemoryBank.open(folder / "bank")
    assert bank.configure(loaded.config).memory.heads == loaded.config.memory.heads
    return WarmSource(bank)


@pytest.mark.parametrize("source", ["cold", "warm"])
def test_heads_that_hold_no_memory_read_none(loaded, retriever, tmp_path, source):
    from megatron_m3.inference.engine import Engine

    some, prompts = with_heads(loaded, "0:1;1:0,1;2:0"), prompts_of(loaded, [5, 11])
    memories = cold(some, retriever) if source == "cold" else warm(some, retriever, tmp_path)
    found, _ = Engine(some, retriever, memories).generate_tokens(prompts, 10, stop_at_eos=False)
    every, _ = Engine(loaded, retriever, cold(loaded, retriever)).generate_tokens(prompts, 10, stop_at_eos=False)
    assert [one.tokens for one in found] != [one.tokens for one in every]
    for prompt, one in zip(prompts, found, strict=True):
        assert one.tokens == generate_by_definition(some, retriever, prompt, 10)
        for read in one.chunks[0].references:
            length = int(retriever.references.tokens([read.id])[1][0])
            kept = list(range(length))
            assert read.kept_positions == [[[], kept], [kept, kept], [kept, []]]


def test_memories_matter(loaded, engine):
    prompts = prompts_of(loaded, [5, 8, 16, 19])
    plain, _ = type(engine)(loaded).generate_tokens(prompts, 18, stop_at_eos=False)
    found, _ = engine.generate_tokens(prompts, 18, stop_at_eos=False)
    assert all(one.tokens != other.tokens for one, other in zip(found, plain, strict=True))


def test_a_batch_equals_its_prompts_one_by_one(loaded, engine):
    prompts = prompts_of(loaded, [0, 3, 8, 11, 24])
    together, _ = engine.generate_tokens(prompts, 20)
    for prompt, one in zip(prompts, together, strict=True):
        (alone,), _ = engine.generate_tokens([prompt], 20)
        assert (one.tokens, one.ended) == (alone.tokens, alone.ended)
        assert [[ref.id for ref in chunk.references] for chunk in one.chunks] == [
            [ref.id for ref in chunk.references] for chunk in alone.chunks
        ]


def test_who_joins_a_batch_late_or_outlives_others_generates_what_it_does_alone(loaded, retriever, engine):
    from megatron_m3.inference.generation import Continuation
    from megatron_m3.inference.sampling import Sampling, draws

    ahead = type(engine)(loaded, retriever, cold(loaded, retriever), prefetch_tokens=3)
    # when the second one joins the first, which reads nothing yet, it is as long
    prompts, counts = prompts_of(loaded, [0, 5, 8, 19]), [30, 26, 11, 20]
    drawn = [draws(Sampling(temperature=row % 2), [prompt])[0] for row, prompt in enumerate(prompts)]
    whole = [Continuation(prompt=prompt, max_new_tokens=count, draw=draw)
             for prompt, count, draw in zip(prompts, counts, drawn, strict=True)]
    with torch.inference_mode():
        batch = ahead.batch(whole[:1], stop_at_eos=False)
        batch.prefill()
        for late in (whole[1:2], whole[2:]):
            for _ in range(5):
                batch.step()
            joining = ahead.batch(late, stop_at_eos=False)
            joining.prefill()
            batch.join(joining)
        whole[0].dropped = True
        while batch.goes_on:
            batch.step()
    assert [len(one.tokens) for one in whole] == [11, *counts[1:]]
    for row, one in enumerate(whole):
        sampling = Sampling(temperature=row % 2)
        (alone,), _ = engine.generate_tokens([one.prompt], len(one.tokens), sampling, stop_at_eos=False)
        found = ahead.generation(one)
        assert found.tokens == alone.tokens
        assert [[ref.id for ref in chunk.references] for chunk in found.chunks] == [
            [ref.id for ref in chunk.references] for chunk in alone.chunks
        ]


def test_every_chunk_says_what_it_read(loaded, retriever, engine):
    prompts = prompts_of(loaded, [19])
    (one,), statistics = engine.generate_tokens(prompts, 20, stop_at_eos=False)
    assert [(chunk.part, chunk.first_token, chunk.num_tokens) for chunk in one.chunks] == [
        ("prompt", 0, 8),
        ("prompt", 8, 8),
        ("prompt", 16, 3),
        ("generated", 0, 8),
        ("generated", 8, 8),
        ("generated", 16, 4),
    ]
    prompt = prompts[0]
    queries = [prompt[:8], prompt[8:16], prompt[16:], prompt[16:], one.tokens[:8], one.tokens[8:16]]
    expected = retriever.retrieve(queries, 2)
    for row, chunk in enumerate(one.chunks):
        valid = expected.valid[row]
        assert [ref.id for ref in chunk.references] == expected.ids[row][valid].tolist()
        assert [ref.score for ref in chunk.references] == pytest.approx(expected.scores[row][valid].tolist(), abs=1e-6)
        for ref in chunk.references:
            assert ref.text == retriever.references.text(ref.id)
            length = int(retriever.references.tokens([ref.id])[1][0])
            assert ref.kept_positions == [[list(range(length))] * 2] * 3
    inherited = len(one.chunks[3].references)
    assert statistics.references_read == sum(len(chunk.references) for chunk in one.chunks) - inherited
    assert statistics.to_dict()["generated_tokens"] == 20
    assert "kept_positions" not in str(one.to_dict())


def test_reading_ahead_changes_speed_alone(loaded, retriever, tmp_path):
    from megatron_m3.inference.engine import Engine
    from megatron_m3.inference.sampling import Sampling
    from megatron_m3.memory import MemoryBank, WarmSource

    warm(loaded, retriever, tmp_path)
    folder = tmp_path / "bank"
    prompts, outputs = [prompts_of(loaded, [1])[0]] * 8, []
    for tokens in (0, 2, 7):
        engine = Engine(loaded, retriever, WarmSource(MemoryBank.open(folder)), prefetch_tokens=tokens)
        found, statistics = engine.generate_tokens(prompts, 35, Sampling(temperature=9.0), stop_at_eos=False)
        outputs.append(([one.to_dict() for one in found], statistics))
    (plain, none), *others = outputs
    assert none.prefetched == 0
    for one, statistics in others:
        assert one == plain
        assert statistics.prefetched >= statistics.prefetched_useful > 0
        assert statistics.to_dict()["prefetched_wasted"] == statistics.prefetched - statistics.prefetched_useful
        assert statistics.cache_misses < none.cache_misses
    for wrong in (-1, 8):
        with pytest.raises(ConfigError, match=f"prefetch_tokens={wrong}: must be 0"):
            Engine(loaded, retriever, WarmSource(MemoryBank.open(folder)), prefetch_tokens=wrong)


def test_errors_of_the_retrieval_ahead_are_nobodys(engine, capsys):
    """The recall of the chunk that gave rise to it meets the error again; that of another does not."""
    from megatron_m3.inference.generation import Statistics

    engine.recall.look_ahead([["no token"]], [[]])
    assert len(engine.recall([[5]], [[5]], Statistics()).rows) == 1
    engine.recall.finish()
    assert "not read ahead: ValueError: " in capsys.readouterr().err
    with pytest.raises(ValueError, match="no token"):
        engine.recall([["no token"]], [[]], Statistics())


def test_a_retrieval_ahead_keeps_nobody_waiting_and_those_that_wait_are_one(loaded, retriever, monkeypatch):
    from megatron_m3.inference.engine import Engine

    asked, begun, gate = [], threading.Event(), threading.Event()

    def search(vectors, k):
        asked.append(len(vectors))
        begun.set()
        assert gate.wait(30)
        return type(retriever.index).search(retriever.index, vectors, k)

    monkeypatch.setattr(retriever.index, "search", search)
    recall = Engine(loaded, retriever, cold(loaded, retriever)).recall
    recall.look_ahead([[5]], [[]])
    assert begun.wait(30)
    for token in (6, 7, 8):
        recall.look_ahead([[token]], [[]])
    assert asked == [1]
    gate.set()
    recall.finish()
    assert asked == [1, 3]


def test_slots_of_missing_results_stay_empty(loaded, retriever):
    """With more references asked for than there are, the answer is that of exactly as many."""
    from megatron_m3.inference.engine import Engine

    def tokens(references_per_chunk):
        memory = dataclasses.replace(loaded.config.memory, references_per_chunk=references_per_chunk)
        other = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, memory=memory))
        found, _ = Engine(other, retriever, cold(loaded, retriever)).generate_tokens(prompts_of(loaded, [5, 8]), 12)
        return [one.tokens for one in found]

    assert tokens(NUM_REFERENCES + 7) == tokens(NUM_REFERENCES) != tokens(2)


def test_the_evaluation_filter_drops_what_the_prompt_gives_away(loaded, retriever, engine):
    tokens, lengths = retriever.references.tokens(np.array([3, 5]))
    copied = [row[:size] for row, size in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    filtered = type(engine)(loaded, retriever, cold(loaded, retriever), max_overlap=2 / 3)
    found, _ = filtered.generate_tokens(copied, 10, stop_at_eos=False)
    without, _ = engine.generate_tokens(copied, 10, stop_at_eos=False)
    for own, one, other in zip((3, 5), found, without, strict=True):
        assert own in {reference.id for reference in other.chunks[0].references}
        assert all(own != reference.id for chunk in one.chunks for reference in chunk.references)
        assert len(one.chunks[0].references) == len(other.chunks[0].references)


class Without:
    """A retriever whose results are missing where they are some references."""

    def __init__(self, retriever, ids):
        self.inner, self.ids, self.references = retriever, ids, retriever.references

    def retrieve(self, chunks, k):
        found = self.inner.retrieve(chunks, k)
        return found._replace(valid=found.valid & ~np.isin(found.ids, self.ids))


def test_memories_deleted_from_the_bank_are_not_read(loaded, retriever, tmp_path):
    """The index still finds them; nothing takes their place, and they do not count as read."""
    from megatron_m3.inference.engine import Engine
    from megatron_m3.memory import MemoryBank, WarmSource
    from megatron_m3.memory.editing import delete_references

    source, prompts = warm(loaded, retriever, tmp_path), prompts_of(loaded, [5, 11])
    before, read = Engine(loaded, retriever, source).generate_tokens(prompts, 10, stop_at_eos=False)
    deleted = np.unique([ref.id for one in before for chunk in one.chunks for ref in chunk.references[:1]])
    delete_references(tmp_path / "bank", deleted)
    source = WarmSource(MemoryBank.open(tmp_path / "bank"))
    after, left = Engine(loaded, retriever, source).generate_tokens(prompts, 10, stop_at_eos=False)
    assert not {ref.id for one in after for chunk in one.chunks for ref in chunk.references} & set(deleted.tolist())
    assert not left.seen & set(deleted.tolist())
    assert 0 < left.references_read < read.references_read
    for prompt, one in zip(prompts, after, strict=True):
        assert one.tokens == generate_by_definition(loaded, Without(retriever, deleted), prompt, 10)
    delete_references(tmp_path / "bank", np.arange(NUM_REFERENCES))
    source = WarmSource(MemoryBank.open(tmp_path / "bank"))
    assert Engine(loaded, retriever, source).generate_tokens(prompts, 10)[1].references_read == 0
