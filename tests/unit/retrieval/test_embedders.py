"""Embedders: rare words decide, same texts give same bytes, a changed model is refused."""

from pathlib import Path

import numpy as np
import pytest

from megatron_m3.errors import ArtifactError, ConfigError, DataError
from megatron_m3.retrieval import load_embedder
from megatron_m3.retrieval.embedder import copy_embedder
from megatron_m3.retrieval.tfidf import train_tfidf
from megatron_m3.retrieval.transformer import make_transformer

NAMES = [f"name{number:03d}" for number in range(200)]
TEXTS = [f"The {name} is a kind of thing that people use for work and for play, or so they say." for name in NAMES]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat", "dog", "ran"]
SENTENCES = ["the cat sat on a mat", "dog", "", "the dog ran the dog ran the dog ran", "a cat ran"]


@pytest.fixture(scope="module")
def tfidf(tmp_path_factory):
    return train_tfidf(TEXTS, tmp_path_factory.mktemp("tfidf") / "embedder", size=256, complete=True)


def test_tfidf_finds_the_text_with_the_rare_word(tfidf):
    vectors = tfidf.embed(TEXTS)
    queries = tfidf.embed([f"And then they told us for the first time of the {name.upper()}!" for name in NAMES])
    assert (queries @ vectors.T).argmax(axis=1).tolist() == list(range(len(NAMES)))


def test_tfidf_vectors_have_length_one_or_zero(tfidf):
    vectors = tfidf.embed([*TEXTS, "", "?! --", "unheardof wordsonly"])
    assert vectors.dtype == np.float32
    assert vectors.shape == (203, 256)
    np.testing.assert_allclose(np.linalg.norm(vectors[:-3], axis=1), 1, rtol=1e-6)
    assert not vectors[-3:].any()
    assert tfidf.embed([]).shape == (0, 256)


def test_tfidf_vector_does_not_depend_on_the_batch(tfidf):
    together = tfidf.embed(TEXTS)
    assert all((tfidf.embed([text])[0] == row).all() for text, row in zip(TEXTS, together, strict=True))


def test_tfidf_words_outside_a_sample_count_most(tmp_path):
    embedder = train_tfidf(TEXTS[:50], tmp_path / "embedder", size=256, complete=False)
    alike = embedder.embed(["name150 people", "name150", "people"])
    assert alike[0] @ alike[1] > 0.9 > 0.5 > alike[0] @ alike[2]


def test_tfidf_parts_words_of_scripts_without_spaces(tmp_path):
    texts = ["猫が好きです", "犬が好きです", "日本の山", "cat猫"]
    embedder = train_tfidf(texts, tmp_path / "embedder", size=256, complete=True)
    assert (embedder.embed(["白い猫", "山"]) @ embedder.embed(texts).T).argmax(axis=1).tolist()[1] == 2
    assert (embedder.embed(["猫"]) @ embedder.embed(texts).T)[0, [0, 3]].min() > 0.2


def test_same_texts_same_bytes_and_reopened_the_same(tfidf, tmp_path):
    again = train_tfidf(TEXTS, tmp_path / "again", size=256, complete=True)
    assert again.hash == tfidf.hash
    copy_embedder(tmp_path / "again", tmp_path / "copy")
    opened = load_embedder(tmp_path / "copy")
    assert opened.hash == tfidf.hash
    assert (opened.embed(TEXTS) == tfidf.embed(TEXTS)).all()


def test_damaged_embedder_is_refused(tmp_path):
    train_tfidf(TEXTS, tmp_path / "embedder", size=256, complete=True)
    path = tmp_path / "embedder" / "words.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="checksum"):
        load_embedder(tmp_path / "embedder")


def test_texts_without_words_are_refused(tmp_path):
    with pytest.raises(DataError, match="no words"):
        train_tfidf(["...", "!!"], tmp_path / "embedder", size=16, complete=True)
    assert not (tmp_path / "embedder").exists()


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A tiny BERT with random weights, as a Hugging Face folder."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=64, max_position_embeddings=40,
                         initializer_range=0.5)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_transformer_equals_the_model_one_by_one(bert, tmp_path, pooling):
    import torch
    from transformers import AutoModel, AutoTokenizer

    embedder = make_transformer(str(bert), tmp_path / "embedder", pooling=pooling, max_length=40)
    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    for sentence, vector in zip(SENTENCES, embedder.embed(SENTENCES), strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
        expected = hidden[0] if pooling == "cls" else hidden.mean(0)
        np.testing.assert_allclose(vector, torch.nn.functional.normalize(expected, dim=0).numpy(), atol=2e-6)
    assert embedder.embed([]).shape == (0, 32)
    opened = load_embedder(tmp_path / "embedder")
    assert opened.hash == embedder.hash
    assert (opened.embed(SENTENCES) == embedder.embed(SENTENCES)).all()


def test_transformer_cuts_long_texts(bert, tmp_path):
    embedder = make_transformer(str(bert), tmp_path / "embedder", pooling="cls", max_length=8)
    long, cut = embedder.embed(["cat " * 100, "cat " * 6])
    np.testing.assert_allclose(long, cut, atol=2e-6)


def test_transformer_that_changed_or_cannot_be_is_refused(bert, tmp_path):
    import shutil

    from transformers import AutoModel

    moved = shutil.copytree(bert, tmp_path / "bert")
    make_transformer(str(moved), tmp_path / "embedder", pooling="cls", max_length=8)
    model = AutoModel.from_pretrained(moved)
    model.pooler.dense.bias.data += 1
    model.save_pretrained(moved)
    with pytest.raises(ArtifactError, match="changed since"):
        load_embedder(tmp_path / "embedder")
    with pytest.raises(ConfigError, match="max_length=41"):
        make_transformer(str(bert), tmp_path / "other", pooling="cls", max_length=41)
    with pytest.raises(ConfigError, match="model="):
        make_transformer(str(tmp_path), tmp_path / "other", pooling="cls", max_length=8)
    assert not (tmp_path / "other").exists()
