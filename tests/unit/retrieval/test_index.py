"""The vector index against comparison with every vector."""

import re

import faiss
import numpy as np
import pytest

from data_tools.faiss_build import make_faiss, train_faiss
from megatron_m3.errors import ArtifactError, ConfigError
from megatron_m3.manifest import Manifest, hash_file, write_manifest
from megatron_m3.ops.codec.reference import make_index as make_codec_index
from megatron_m3.retrieval.index import (
    FILE,
    MISSING,
    VectorIndex,
)


def unit_vectors(count: int, size: int = 16, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_index(vectors: np.ndarray, factory: str = "Flat") -> VectorIndex:
    manifest = Manifest(kind="index", schema=1, inputs={}, settings={}, files={})
    made = train_faiss(factory, vectors.shape[1], vectors)
    made.add(vectors)
    return VectorIndex(None, manifest, made)


def test_search_is_exact_and_in_order():
    vectors, queries = unit_vectors(300), unit_vectors(40, seed=1)
    found = make_index(vectors).search(queries, 7)
    likeness = queries @ vectors.T
    assert found.valid.all()
    assert (found.ids == np.argsort(-likeness, axis=1)[:, :7]).all()
    np.testing.assert_allclose(found.scores, -np.sort(-likeness, axis=1)[:, :7], rtol=1e-5)


def test_equal_references_come_in_order_of_id():
    vectors = np.repeat(unit_vectors(3), 4, axis=0)
    assert make_index(vectors).search(vectors[[5]], 4).ids.tolist() == [[4, 5, 6, 7]]


def test_missing_is_missing():
    vectors = unit_vectors(3)
    found = make_index(vectors).search(np.stack([vectors[0], np.zeros(16, np.float32)]), 5)
    assert found.valid.tolist() == [[True, True, True, False, False], [False] * 5]
    assert (found.ids[~found.valid] == MISSING).all()
    assert not found.scores[~found.valid].any()
    with pytest.raises(IndexError):
        vectors[found.ids[0, 4]]


def test_filtered_search_equals_filtering_the_whole_order():
    vectors, queries = unit_vectors(200), unit_vectors(30, seed=1)
    allowed = np.random.default_rng(2).random((30, 200)) < np.linspace(0, 1, 30)[:, None] ** 3
    found = make_index(vectors).search_filtered(queries, 5, lambda row, ids: ~allowed[row, ids])
    for row, order in enumerate(np.argsort(-(queries @ vectors.T), axis=1)):
        expected = [one for one in order if allowed[row, one]][:5]
        assert found.ids[row, : len(expected)].tolist() == expected
        assert found.valid[row].tolist() == [True] * len(expected) + [False] * (5 - len(expected))
        assert (found.ids[row, len(expected):] == MISSING).all()


def test_filtered_search_for_more_than_there_are():
    found = make_index(unit_vectors(3)).search_filtered(unit_vectors(1), 5, lambda row, ids: ids == 1)
    assert sorted(found.ids[0, :2].tolist()) == [0, 2]
    assert found.valid[0].tolist() == [True, True, False, False, False]


def test_a_filter_that_drops_all_is_asked_a_bounded_number_of_candidates_at_once(monkeypatch):
    index, asked = make_index(unit_vectors(200)), []
    search = index.faiss_index.search
    monkeypatch.setattr("megatron_m3.retrieval.index.FOUND_AT_ONCE", 1000)
    monkeypatch.setattr(index, "faiss_index", type("Counting", (), {
        "ntotal": 200, "search": lambda self, vectors, k: asked.append(len(vectors) * k) or search(vectors, k)})())
    found = index.search_filtered(unit_vectors(30, seed=1), 5, lambda row, ids: (ids != 7) & (row > 0))
    assert max(asked) <= 1000
    assert found.valid.sum(axis=1).tolist() == [5] + 29 * [1]
    assert (found.ids[1:, 0] == 7).all()


@pytest.mark.parametrize("factory", ["Nonsense", "IVF4096,Flat", "PQ7", "PQ4x-1", "HNSW99999999999"])
def test_factory_that_cannot_be_is_refused(factory):
    with pytest.raises(ConfigError, match=f"factory={factory}"):
        make_index(unit_vectors(100), factory)


@pytest.mark.parametrize(
    "factory", ["HNSW0", "IVF4(HNSW00),Flat", "IVF4_HNSW1,Flat", "PQ4x0", "IVF4,PQ4x4fs_0", "RR0,Flat"])
def test_factory_over_which_faiss_would_end_the_process_is_refused(factory):
    for make in (lambda: make_faiss(factory, 16, 100), lambda: make_codec_index(factory, 16)):
        with pytest.raises(ConfigError, match=rf"={re.escape(factory)}: FAISS .*\((0+|HNSW1) is too few\)"):
            make()


@pytest.mark.parametrize("factory", ["HNSW10", "IVF10,PQ8x4", "IVF1,Flat"])
def test_numbers_that_hold_a_zero_are_none(factory):
    assert make_faiss(factory, 16, 100).ntotal == 0


def seal(folder) -> None:
    """A manifest of the index file as it is."""
    files = {FILE: hash_file(folder / FILE)}
    write_manifest(folder, Manifest(kind="index", schema=1, inputs={}, settings={}, files=files))


def test_a_damaged_index_is_refused(tmp_path):
    path = tmp_path / FILE
    faiss.write_index(make_index(unit_vectors(30)).faiss_index, str(path))
    seal(tmp_path)
    assert len(VectorIndex.open(tmp_path)) == 30
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"index\.faiss: checksum"):
        VectorIndex.open(tmp_path)
    path.write_bytes(b"nothing" * 9)
    seal(tmp_path)
    with pytest.raises(ArtifactError, match=r"index\.faiss: not an index that FAISS can read"):
        VectorIndex.open(tmp_path)
