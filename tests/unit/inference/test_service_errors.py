"""Errors of a service: a prompt's own end that prompt, a pass's own those that run, a lost device all there is."""

import dataclasses
import queue
import threading
import weakref

import pytest
import torch

from megatron_m3.model.checkpoint import LoadedModel
from tests.knowledge import build_knowledge
from tests.tiny_model import sentence, tiny_model

NEW = 30
BROKEN_TOKEN = 511
"""One that fills up the vocabulary, so that it is never drawn."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def loaded(folder):
    """A model that knows no number for one token."""
    loaded = tiny_model(folder, memory__layers="0-2", model__tie_embeddings="false",
                        model__vocab_size="511")
    with torch.no_grad():
        loaded.model.embedding.word_embeddings.weight[BROKEN_TOKEN] = float("nan")
    return loaded


@pytest.fixture(scope="module")
def bank(folder, loaded):
    """A retriever, and the folder of a bank of its references."""
    from mpi4py import MPI

    from megatron_m3.config.bank import BankConfig
    from megatron_m3.memory.build import build_bank
    from megatron_m3.retrieval import Retriever

    paths = build_knowledge(folder, folder / "tokenizer", count=200, words=10,
                            reference_length=loaded.config.memory.reference_length)
    options = BankConfig(checkpoint="run", references=str(paths["references"]), output=str(folder / "bank"),
                         codec="none")
    build_bank(options, MPI.COMM_SELF, lambda path: loaded)
    return Retriever.open(paths["index"], paths["references"], loaded.tokenizer), folder / "bank"


@pytest.fixture
def engine(loaded, bank):
    """Reads every memory from the disk."""
    from megatron_m3.inference.engine import Engine
    from megatron_m3.memory import MemoryBank, WarmSource

    source = WarmSource(MemoryBank.open(bank[1]), cache_bytes=0, decoded_bytes=0)
    return Engine(loaded, bank[0], source)


class Asking:
    """Submits prompts to a service, and takes what it tells."""

    def __init__(self, engine, batch=4):
        from megatron_m3.inference.metrics import Metrics
        from megatron_m3.inference.service import Service

        self.service, self.news = Service(engine, Metrics(), batch=batch, queue=9), queue.SimpleQueue()

    def ticket(self, prompt, new=NEW, tokenizer=None):
        from megatron_m3.inference.generation import Continuation
        from megatron_m3.inference.sampling import Sampling, draws
        from megatron_m3.inference.service import Ticket
        from megatron_m3.inference.writer import Writer

        [draw] = draws(Sampling(temperature=1.0, seed=3), [prompt])
        return Ticket(index=0, continuation=Continuation(prompt=prompt, max_new_tokens=new, draw=draw),
                      writer=Writer(tokenizer or self.service.engine.loaded.tokenizer), tell=self.news.put,
                      in_pieces=False)

    def ask(self, *tickets):
        """The last pieces, in the order of the tickets."""
        self.service.submit(tickets)
        told = {piece.ticket: piece for piece in (self.news.get(timeout=60) for _ in tickets)}
        return [told[ticket] for ticket in tickets]


@pytest.fixture
def asking(engine):
    asking = Asking(engine)
    yield asking
    asking.service.close()


def prompts_of(loaded, seeds):
    return [loaded.tokenizer.encode(sentence(seed, 12)) for seed in seeds]


def alone(asking, prompt):
    [piece] = asking.ask(asking.ticket(prompt))
    assert piece.reason in ("length", "stop"), piece.error
    return piece


def test_logits_that_are_no_numbers_end_the_prompt_that_has_them(asking, loaded, engine):
    from megatron_m3.errors import M3Error
    from megatron_m3.inference.sampling import Sampling

    good, other = prompts_of(loaded, [1, 2])
    expected = alone(asking, good).text
    broken = [*other[:5], BROKEN_TOKEN, *other[5:]]
    failed, went_on = asking.ask(asking.ticket(broken), asking.ticket(good))
    assert (failed.reason, failed.text) == ("failed", "")
    assert "logits are no numbers" in failed.error
    assert "\n" not in failed.error
    assert (went_on.reason, went_on.text) == ("length", expected)
    for sampling in (Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=5, top_p=0.9)):
        with pytest.raises(M3Error, match="logits are no numbers"):
            engine.generate_tokens([good, broken], 2, sampling)


def test_numbers_that_are_lost_in_mid_text_end_one_sequence(loaded, engine):
    from megatron_m3.inference.generation import Continuation
    from megatron_m3.inference.sampling import Sampling, draws

    prompts = prompts_of(loaded, [3, 4])
    expected = engine.generate_tokens(prompts, NEW, Sampling(temperature=1.0), stop_at_eos=False)[0][1].tokens
    first, second = ones = [Continuation(prompt=prompt, max_new_tokens=NEW, draw=draw)
                            for prompt, draw in zip(prompts, draws(Sampling(temperature=1.0), prompts), strict=True)]
    batch = engine.batch(ones, stop_at_eos=False)
    with torch.inference_mode():
        batch.prefill()
        for step in range(NEW - 1):
            if step == 10:
                batch.cache.values[1][0, :, 0] = float("nan")
            batch.step()
    assert (len(first.tokens), str(first.failure)[:22]) == (11, "checkpoint: its logits")
    assert (second.tokens, second.failure) == (expected, None)


def generated_reads(piece):
    return {one.id for part, first, read in piece.ticket.continuation.read if part == "generated" and first
            for one in read}


def all_reads(piece):
    return {one.id for _, _, read in piece.ticket.continuation.read for one in read}


def test_a_damaged_memory_ends_the_prompt_that_reads_it(asking, loaded, bank, engine):
    """In mid-text, and in a prompt that is read together with another."""
    prompts = prompts_of(loaded, [5, 6])
    victim, good = (alone(asking, prompt) for prompt in prompts)
    prompt_reads = {one.id for part, first, read in victim.ticket.continuation.read if not first for one in read}
    [damaged, *_] = sorted(generated_reads(victim) - prompt_reads - all_reads(good))
    shard, size = bank[1] / "shard_000000.bin", engine.recall.source._origin.record_bytes
    whole = shard.read_bytes()
    broken = bytearray(whole)
    broken[damaged * size + 1] ^= 1
    shard.write_bytes(broken)
    try:
        failed, went_on = asking.ask(*map(asking.ticket, prompts))
        assert f"the record of reference {damaged} is damaged" in failed.error
        assert went_on.text == good.text
        retrieving = bank[0].references.tokens([damaged])[0][0].tolist()[:10]
        at_once, went_on = asking.ask(asking.ticket(retrieving), asking.ticket(prompts[1]))
        assert f"the record of reference {damaged} is damaged" in at_once.error
        assert went_on.text == good.text
    finally:
        shard.write_bytes(whole)
    assert alone(asking, prompts[0]).text == victim.text


class Wordless:
    """A tokenizer that cannot write what it read."""

    def decode(self, ids):
        raise LookupError("no such word")


def test_errors_of_ours_end_what_they_concern(asking, loaded, capsys):
    good, other = prompts_of(loaded, [7, 8])
    expected = alone(asking, good).text
    wordless, went_on, huge = asking.ask(asking.ticket(other, tokenizer=Wordless()), asking.ticket(good),
                                         asking.ticket([1 << 40]))
    assert wordless.error == "the server met an error of its own (LookupError); see its log"
    assert huge.error == "the server met an error of its own (OverflowError); see its log"
    assert went_on.text == expected
    log = capsys.readouterr().err
    assert log.count("LookupError: no such word") == 1
    assert log.count("OverflowError: ") == 1
    beyond, beside = asking.ticket(good, new=2), asking.ticket(other)
    beside.tell = lambda piece: asking.news.put(piece) if piece.reason else grow()
    beside.in_pieces = True

    def grow():
        beside.continuation.max_new_tokens = 3 * NEW  # more than its cache has columns for

    assert beyond.continuation.goes_on
    ended, failed = asking.ask(beyond, beside)
    assert ended.reason == "length"
    assert "an error of its own" in failed.error, "the pass fails for all who run"
    assert alone(asking, good).text == expected


def test_prompts_that_failed_together_leave_no_room_taken_while_each_is_read_alone(asking, loaded, engine, monkeypatch):
    made, held, begin = [], [], engine.batch

    def batch(ones):
        held.append(sum(one() is not None for one in made))
        new = begin(ones)
        made.append(weakref.ref(new))
        return new

    monkeypatch.setattr(engine, "batch", batch)
    good, huge = asking.ask(asking.ticket(prompts_of(loaded, [7])[0], new=2), asking.ticket([1 << 40]))
    assert (good.reason, huge.reason) == ("length", "failed")
    assert held == [0, 0, 1], "both, the good one alone beside nothing, the other beside it"


class Lost(LoadedModel):
    """A model whose device gives no number back."""

    @property
    def device(self):
        return torch.device("meta")


def test_a_lost_device_ends_the_service(engine, loaded):
    from megatron_m3.inference.service import BrokenError

    asking, left = Asking(engine), threading.Event()
    asking.service.on_failure = left.set
    engine.loaded = Lost(**{field.name: getattr(loaded, field.name) for field in dataclasses.fields(loaded)})
    running = asking.ticket(prompts_of(loaded, [1])[0], new=100)
    running.in_pieces, began = True, threading.Event()
    running.tell = lambda piece: asking.news.put(piece) if piece.reason else began.set()
    asking.service.submit([running])
    assert began.wait(60)
    asking.service.submit([asking.ticket([1 << 40])])
    assert {asking.news.get(timeout=60).error for _ in range(2)} == {asking.service.told}
    assert asking.service.told.startswith("the server has failed and leaves (")
    assert "\n" not in asking.service.told
    assert left.wait(60)
    with pytest.raises(BrokenError, match="has failed and leaves"):
        asking.service.submit([asking.ticket([5])])
    asking.service.close()
