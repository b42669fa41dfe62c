"""Building the index in shared stages: the bytes of one pass by FAISS itself, whoever does what, and its recall."""

import pickle
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import faiss
import numpy as np
import pytest

from data_tools import faiss_build, index
from data_tools.embeddings import Embeddings
from data_tools.index import IndexBuild, Options
from megatron_m3.errors import ArtifactError, ConfigError
from megatron_m3.manifest import BlockFolder, Manifest, write_manifest
from megatron_m3.platform.threads import one_faiss_thread
from megatron_m3.retrieval import VectorIndex
from megatron_m3.retrieval.tfidf import train_tfidf
from tests.damage import flip_after
from tests.launcher import ROOT

COUNT, SIZE, BLOCK = 1000, 16, 300
INPUTS = {"references": "0" * 64}
INVERTED, PACKED = "PCA8,IVF16,PQ4x4", "IVF16,PQ4x4fs"


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    """Vectors around some topics, two of them 0, in four blocks."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((40, SIZE))[rng.integers(40, size=COUNT)] + 0.6 * rng.standard_normal((COUNT, SIZE))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    vectors[[5, 700]] = 0
    folder = tmp_path_factory.mktemp("embeddings")
    blocks = BlockFolder(folder, {"kind": "test"})
    parts = np.split(vectors, range(BLOCK, COUNT, BLOCK))
    for number, part in enumerate(parts):
        blocks.write(number, {"vectors": part})
    train_tfidf(["some words"], folder / "embedder", size=SIZE, complete=True)
    write_manifest(folder, Manifest(kind="embeddings", schema=1, inputs=INPUTS, settings={},
                                    files=blocks.files(len(parts)), info={"size": SIZE, "references": COUNT}))
    return Embeddings(folder, INPUTS["references"])


def options_for(output: Path, factory: str = INVERTED, **more: object) -> Options:
    return Options(references="", embeddings="", output=str(output), factory=factory, **more)


def build(options: Options, embeddings: Embeddings) -> dict:
    return index.build(options, {"factory": options.factory, "recall": options.recall}, INPUTS, embeddings)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", INVERTED, PACKED, "IVF16_HNSW8,SQ8", "HNSW8"])
def test_stages_in_any_order_give_the_bytes_of_one_pass(embeddings, tmp_path, factory):
    options = options_for(tmp_path / "index", factory)
    work = IndexBuild(options, factory, embeddings, {"kind": "test"})
    others = [pickle.loads(pickle.dumps(work)) for _ in range(2)]
    others[0].train(0)
    for number in (2, 0, 3, 1):
        others[number % 2].encode(number)
    work.merge(0)
    whole = VectorIndex(tmp_path / "index", Manifest(kind="", schema=1, inputs={}, settings={}, files={}),
                        faiss.read_index(str(tmp_path / "index" / "index.faiss")))
    expected = faiss_build.train_faiss(factory, SIZE, embeddings.sample(COUNT))
    with one_faiss_thread():
        for block in embeddings.blocks():
            expected.add(block)
    found = work.output.read_info(0)
    if "lists_read" in found:
        faiss.extract_index_ivf(expected).nprobe = found["lists_read"]
    if "ef_search" in found:
        expected.hnsw.efSearch = found["ef_search"]
    assert (faiss.serialize_index(whole.faiss_index) == faiss.serialize_index(expected)).all()
    assert np.load(tmp_path / "index" / "never_found.npy").tolist() == [5, 700]
    size = (tmp_path / "index" / "index.faiss").stat().st_size
    assert faiss_build.memory(expected, COUNT) == pytest.approx(size, rel=0.25)


def test_two_processes_write_the_bytes_of_one(embeddings, tmp_path):
    alone, shared = (options_for(tmp_path / name, workers=count) for name, count in (("alone", 1), ("shared", 2)))
    assert build(alone, embeddings) == build(shared, embeddings)
    assert contents(tmp_path / "alone") == contents(tmp_path / "shared")
    assert not (tmp_path / "shared" / "stages").exists()


def test_a_killed_build_goes_on_from_its_blocks(embeddings, tmp_path, monkeypatch):
    options, done = options_for(tmp_path / "index"), []
    encode = faiss_build.encode

    def dies(trained, vectors):
        done.append(len(vectors))
        if len(done) == 3:
            raise KeyboardInterrupt
        return encode(trained, vectors)

    monkeypatch.setattr(faiss_build, "encode", dies)
    monkeypatch.setattr(faiss_build, "train_faiss", once(faiss_build.train_faiss))
    with pytest.raises(KeyboardInterrupt):
        build(options, embeddings)
    assert not (tmp_path / "index" / "manifest.json").exists()
    build(options, embeddings)
    assert len(done) == 5
    assert (tmp_path / "index" / "manifest.json").exists()


def once(function):
    """The function, which may be called once."""
    calls = []

    def called(*given):
        calls.append(given)
        assert len(calls) == 1
        return function(*given)

    return called


def test_inverted_lists_are_read_until_the_recall_is_there_or_reading_does_not_help(embeddings, tmp_path, capsys):
    info = build(options_for(tmp_path / "lists", "IVF16,Flat", recall=1.0), embeddings)
    assert (info["lists_read"], info["recall"]) == (16, 1.0)
    info = build(options_for(tmp_path / "few", "IVF16,Flat", recall=0.5), embeddings)
    assert info["lists_read"] < 16
    assert 0.5 <= info["recall"] < 1
    capsys.readouterr()
    info = build(options := options_for(tmp_path / "codes", recall=0.99), embeddings)
    assert info["recall"] < 0.9
    index.report(options, INVERTED, info)
    said = capsys.readouterr().err
    assert f"recall@5 {info['recall']:.4f}" in said
    assert f"0.99 is out of reach of {INVERTED}" in said
    assert "IVF128,SQ8" in said
    info = build(options_for(tmp_path / "graph", "HNSW2", recall=0.99), embeddings)
    assert info["ef_search"] > 16
    assert "a search keeps" not in said
    index.report(options, "HNSW2", info)
    assert f"keeps {info['ef_search']:,} candidates" in capsys.readouterr().err


def test_damaged_vectors_are_refused_by_name(embeddings, tmp_path):
    shutil.copytree(embeddings.folder, tmp_path / "damaged")
    path = tmp_path / "damaged" / "block_000002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"block_000002\.safetensors: checksum differs"):
        build(options_for(tmp_path / "index"), Embeddings(tmp_path / "damaged", INPUTS["references"]))
    assert not (tmp_path / "index" / "manifest.json").exists()


def test_a_disk_that_is_full_at_the_last_bytes_of_the_index(embeddings, tmp_path):
    """The file size limit stands for the full disk."""
    build(options_for(tmp_path / "whole", "IVF16,Flat"), embeddings)
    size, limits = (tmp_path / "whole" / "index.faiss").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 8, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            build(options_for(tmp_path / "full", "IVF16,Flat"), embeddings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    build(options_for(tmp_path / "full", "IVF16,Flat"), embeddings)
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


@pytest.fixture(scope="module")
def whole(embeddings, tmp_path_factory):
    """An index made without trouble."""
    folder = tmp_path_factory.mktemp("whole") / "index"
    build(options_for(folder), embeddings)
    return folder


@pytest.mark.parametrize(("stage", "file", "place"), [
    ("train", "block_000000", "index"), ("encode", "block_000002", "codes"), ("encode", "block_000001", -1),
])
def test_a_flipped_byte_of_a_stage_is_found_and_made_anew(embeddings, whole, tmp_path, monkeypatch, stage, file, place):
    with monkeypatch.context() as patched:
        flip_after(patched, stage, f"{file}.safetensors", place)
        with pytest.raises(ArtifactError, match=rf"{stage}/{file}\.safetensors: damaged.*run the same command again"):
            build(options_for(tmp_path / "index"), embeddings)
    assert not (tmp_path / "index" / "manifest.json").exists()
    build(options_for(tmp_path / "index"), embeddings)
    assert contents(tmp_path / "index") == contents(whole)


def test_too_few_vectors_to_train_leave_nothing(embeddings, tmp_path):
    with pytest.raises(ConfigError, match="factory=IVF16,PQ8x12: FAISS refuses it"):
        build(options_for(tmp_path / "index", "IVF16,PQ8x12"), embeddings)
    assert not (tmp_path / "index").exists()
    with pytest.raises(ConfigError, match="factory=IVF4096,Flat: has more lists than the 1000 vectors"):
        faiss_build.make_faiss("IVF4096,Flat", SIZE, COUNT)
    with pytest.raises(ConfigError, match=r"numbers \(could not parse index string Flot\); try Flat"):
        faiss_build.make_faiss("Flot", SIZE, COUNT)


@pytest.mark.parametrize("factory", ["IDMap,Flat", "IVF0,Flat", "NSG8"])
def test_what_faiss_refuses_late_is_named_and_leaves_nothing(embeddings, tmp_path, factory):
    options = options_for(tmp_path / "index", factory)
    steps = [lambda: index.announce(options, factory, embeddings), lambda: build(options, embeddings)]
    with pytest.raises(ConfigError, match=f"factory={factory}: FAISS refuses it"):
        [step() for step in steps]
    assert not (tmp_path / "index").exists()


def test_a_refused_build_leaves_the_folder_to_another_that_waits_in_it(embeddings, tmp_path, monkeypatch):
    options = options_for(tmp_path / "index", "IVF16,PQ8x12")
    code = ("from megatron_m3.errors import exit_on_user_error; from tests.functional import test_index_build as t\n"
            f"vectors = t.Embeddings(t.Path({str(embeddings.folder)!r}), t.INPUTS['references'])\n"
            f"exit_on_user_error(lambda: t.build(t.{options!r}, vectors))")
    claims, train, others = tmp_path / "index" / "stages" / "train" / ".claims", faiss_build.train_faiss, []

    def waits_for_the_other(*given):
        others.append(subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True))
        while len(list(claims.glob("*.alive"))) < 2:
            assert others[0].poll() is None
            time.sleep(0.01)
        return train(*given)

    monkeypatch.setattr(faiss_build, "train_faiss", waits_for_the_other)
    with pytest.raises(ConfigError, match="FAISS refuses it"):
        build(options, embeddings)
    said = others[0].communicate()[1].splitlines()
    assert (others[0].returncode, len(others)) == (2, 1)
    assert said[-1].startswith("error: factory=IVF16,PQ8x12: FAISS refuses it")
    assert not (tmp_path / "index").exists()


def test_factory_by_count_and_size():
    choose = faiss_build.choose_factory
    assert choose(1, 1024) == choose(faiss_build.FLAT_LIMIT, 1024) == "Flat"
    assert choose(1_000_000, 1024) == "IVF4096,Flat"
    assert choose(110_000_000, 1024) == "OPQ64_256,IVF32768,PQ64"
    assert choose(110_000_000, 90) == "OPQ22_88,IVF32768,PQ22"
    for size in (90, 384, 1024):
        made = faiss_build.make_faiss(choose(110_000_000, size), size, 110_000_000)
        assert faiss_build.memory(made, 110_000_000) < 10e9
        assert faiss_build.sample_size(made) == 40 * 32768
