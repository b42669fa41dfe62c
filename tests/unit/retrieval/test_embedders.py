"""The offline embedder: rare words decide, same texts give same bytes, a damaged folder is refused."""

import numpy as np
import pytest

from megatron_m3.errors import ArtifactError, DataError
from megatron_m3.retrieval import load_embedder
from megatron_m3.retrieval.embedder import copy_embedder
from megatron_m3.retrieval.tfidf import train_tfidf

NAMES = [f"name{number:03d}" for number in range(200)]
TEXTS = [f"The {name} is a kind of thing that people use for work and for play, or so they say." for name in NAMES]


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
