import shutil
from dataclasses import replace

import numpy as np
import pytest

from megatron_m3.data import NeighbourStore, TokenStore, TrainingDataset
from megatron_m3.errors import ArtifactError, ConfigError
from megatron_m3.manifest import block_name
from megatron_m3.references import ReferenceStore
from megatron_m3.retrieval.overlap import overlap
from megatron_m3.tokenizer import Tokenizer
from tests.small_data import CHUNK_LENGTH, write_neighbours

CHUNKS = 4


@pytest.fixture(scope="module")
def dataset(small):
    return TrainingDataset(small.config(stage="continual"))


def change(config, section, **fields):
    return replace(config, **{section: replace(getattr(config, section), **fields)})


def all_chunks(small):
    """Every chunk by the definition: (document, chunk, tokens) of each document cut into runs of chunk_length."""
    store = TokenStore.open(small.tokens)
    for document in range(len(store)):
        tokens = store.document(document).tolist()
        for chunk in range(-(-len(tokens) // CHUNK_LENGTH)):
            yield document, chunk, tokens[chunk * CHUNK_LENGTH : (chunk + 1) * CHUNK_LENGTH]


def test_documents_end_with_eos_and_read_back_as_their_texts(small):
    store, tokenizer = TokenStore.open(small.tokens, check=True), Tokenizer.load(small.tokenizer)
    texts = [tokenizer.decode(store.document(index)) for index in range(len(store))]
    assert all(store.document(index)[-1] == tokenizer.eos_id for index in range(len(store)))
    assert texts[0].startswith("The word ")
    assert len(store.document_ids()) == len(store) == len(set(store.document_ids()))


def test_sequences_hold_every_chunk_in_order(small, dataset):
    chunks = list(all_chunks(small))
    assert len(dataset) == -(-len(chunks) // CHUNKS)
    for index in range(len(dataset)):
        sequence = dataset[index]
        for slot, (_, _, tokens) in enumerate(chunks[index * CHUNKS : (index + 1) * CHUNKS]):
            place = slice(slot * CHUNK_LENGTH, (slot + 1) * CHUNK_LENGTH)
            padding = CHUNK_LENGTH - len(tokens)
            assert sequence["labels"][place].tolist() == tokens + [dataset.eos_id] * padding
            assert sequence["loss_mask"][place].tolist() == [1.0] * len(tokens) + [0.0] * padding
        assert sequence["context"].tolist() == [dataset.bos_id, *sequence["labels"][:-1]]


def test_what_the_last_sequence_lacks_does_not_count(small, dataset):
    total = sum(dataset[index]["loss_mask"].sum() for index in range(len(dataset)))
    assert total == TokenStore.open(small.tokens).lengths.sum()


def expected_choice(dataset, store, ids, valid, tokens):
    for one, good in zip(ids, valid, strict=True):
        reference, length = store.tokens([one])
        if good and overlap(tokens, reference[0, : length[0]]) <= dataset.max_overlap:
            return int(one)
    return None


@pytest.mark.parametrize("query_chunk", ["own", "previous"])
@pytest.mark.parametrize("max_overlap", [0.2, 0.35, 1.0])
def test_each_chunk_gets_the_best_reference_that_does_not_leak(small, query_chunk, max_overlap):
    config = change(small.config(stage="continual"), "memory", query_chunk=query_chunk)
    dataset = TrainingDataset(change(config, "data", max_overlap=max_overlap))
    store, neighbours = ReferenceStore.open(small.references), NeighbourStore.open(small.neighbours)
    chunks, dropped, missing = list(all_chunks(small)), 0, 0
    for index in range(0, len(dataset), 3):
        sequence = dataset[index]
        tokens = sequence["labels"][sequence["loss_mask"] > 0]
        for slot in range(CHUNKS):
            expected = None
            if index * CHUNKS + slot < len(chunks):
                document, chunk, _ = chunks[index * CHUNKS + slot]
                row = chunk - (query_chunk == "previous")
                if row >= 0:
                    ids, valid, _ = (array[row] for array in neighbours.rows(document))
                    expected = expected_choice(dataset, store, ids, valid, tokens)
                    dropped += valid.any() and expected != ids[valid.argmax()]
            place = sequence["chunk_references"][slot]
            if expected is None:
                missing += 1
                assert place == -1
            else:
                found, lengths = store.tokens([expected])
                assert sequence["reference_ids"][place] == expected
                assert sequence["reference_lengths"][place] == lengths[0]
                assert (sequence["references"][place] == found[0]).all()
    assert missing or query_chunk == "own"
    assert bool(dropped) == (max_overlap < 1.0)


def test_a_reference_that_is_the_text_itself_is_dropped(small):
    """References cut from the corpus overlap 1 with the sequence that holds them, and are never given."""
    config = small.config(stage="continual")
    dataset = TrainingDataset(config)
    store = ReferenceStore.open(small.references)
    tokens = store.tokens([5])[0][0, : store.tokens([5])[1][0]]
    ids = np.full((CHUNKS, 3), 5)
    dataset.candidates = lambda index: (ids, np.ones(ids.shape, bool))
    assert not dataset.choose_references(0, np.concatenate([[9, 9], tokens, [9]]))[1].any()
    assert dataset.choose_references(0, np.full(32, 9))[1].all()


def test_warmup_has_no_references_and_needs_none(small):
    dataset = TrainingDataset(change(small.config(), "data", references="", neighbours=""))
    assert set(dataset[0]) == set(dataset.names) == {"context", "labels", "loss_mask"}


def test_names_are_those_of_the_arrays(dataset):
    assert tuple(dataset[0]) == dataset.names


@pytest.mark.parametrize("name", ["tokens", "references", "neighbours", "tokenizer"])
def test_a_folder_that_is_not_given_is_named(small, name):
    with pytest.raises(ConfigError, match=f"data.{name}: give its folder"):
        TrainingDataset(change(small.config(stage="continual"), "data", **{name: ""}))


@pytest.mark.parametrize(("section", "fields", "message"), [
    ("data", {"sequence_length": 48}, None),
    ("memory", {"chunk_length": 16}, r"memory.chunk_length=16: .* was made for 8"),
    ("memory", {"reference_length": 12}, r"memory.reference_length=12: .* up to 16 tokens"),
    ("memory", {"reference_length": 20}, None),
])
def test_lengths_must_fit(small, section, fields, message):
    config = change(small.config(stage="continual"), section, **fields)
    if message:
        with pytest.raises(ConfigError, match=message):
            TrainingDataset(config)
    else:
        assert TrainingDataset(config)[0]["references"].shape[1] == config.memory.reference_length


@pytest.mark.parametrize("role", ["tokens", "references", "tokenizer"])
def test_neighbours_of_something_else_are_refused(small, tmp_path, role):
    tokens, references = TokenStore.open(small.tokens), ReferenceStore.open(small.references)
    tokenizer_hash = tokens.tokenizer_hash
    if role == "tokenizer":
        tokenizer_hash = "other"
    else:
        {"tokens": tokens, "references": references}[role].hash = "other"
    write_neighbours(tmp_path / "neighbours", tokens, references, tokenizer_hash)
    config = change(small.config(stage="continual"), "data", neighbours=str(tmp_path / "neighbours"))
    with pytest.raises(ArtifactError, match=f"this neighbours was made from another {role}"):
        TrainingDataset(config)


def test_damaged_neighbours_are_refused(small, tmp_path):
    folder = tmp_path / "neighbours"
    shutil.copytree(small.neighbours, folder)
    path = folder / block_name(1)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=r"block_000001.*the manifest says"):
        NeighbourStore.open(folder)
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"block_000001.*checksum"):
        NeighbourStore.open(folder, check=True)
    store = NeighbourStore.open(folder)
    store.rows(0)
    with pytest.raises(ArtifactError, match=r"block_000001.*checksum"):
        store.rows(store.documents_per_block)


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx", "documents.jsonl"])
def test_damaged_tokens_are_refused(small, tmp_path, name):
    folder = tmp_path / "tokens"
    shutil.copytree(small.tokens, folder)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{name}: checksum"):
        TokenStore.open(folder).document_ids()
    with pytest.raises(ArtifactError, match=f"{name}: checksum"):
        TokenStore.open(folder, check=True)


@pytest.mark.parametrize("most", [1, 3])
def test_fewer_references_than_chunks_are_those_of_the_first_chunks_that_have_one(small, most):
    config = small.config(stage="continual")
    config = change(change(config, "memory", query_chunk="previous"), "data", max_overlap=0.35)
    every, fewer = TrainingDataset(config), TrainingDataset(change(config, "data", references_per_sequence=most))
    dropped = 0
    for index in range(0, len(every), 3):
        full, part = every[index], fewer[index]
        places = full["chunk_references"]
        dropped += places.max() >= most
        assert len(part["references"]) == len(part["reference_lengths"]) == most
        assert part["chunk_references"].tolist() == np.where(places < most, places, -1).tolist()
        for name in ("references", "reference_lengths", "reference_ids"):
            assert (part[name] == full[name][:most]).all()
    assert dropped
