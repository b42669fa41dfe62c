"""m3 data embed by several processes: one makes the embedder, all share the blocks, the bytes are always the same."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_tools import embed, references, shared_work
from megatron_m3 import platform
from megatron_m3.errors import ConfigError
from megatron_m3.manifest import block_name, map_block
from megatron_m3.manifest.claims import CLAIMS, Claims
from megatron_m3.references import ReferenceStore
from megatron_m3.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
COUNT = 800


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """References in many blocks, and the embeddings that one process made of them."""
    folder = tmp_path_factory.mktemp("embed")
    rng = np.random.default_rng(0)
    texts = [" ".join(f"word{number}" for number in rng.integers(0, 3000, 12)) for _ in range(COUNT)]
    (folder / "texts.txt").write_text("\n\n".join(texts))
    train_tokenizer(texts[:50], 300, folder / "tokenizer")
    references.main(["--input", str(folder / "texts.txt"), "--tokenizer", str(folder / "tokenizer"), "--output",
                     str(folder / "references"), "--block-size", "10"])
    embed.main(arguments(folder, folder / "embeddings"))
    return folder


def arguments(made: Path, output: Path, *more: str) -> list[str]:
    return ["--references", str(made / "references"), "--output", str(output), "--size", "64", *more]


def start(made: Path, output: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "launch.m3", "data", "embed", *arguments(made, output, *more)],
                            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All files but the claims and half-written ones of a killed job."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("[!.]*"))
            if path.is_file() and ".claims" not in path.parts}


def test_jobs_that_share_make_one_embedder_and_the_same_bytes(made, tmp_path):
    with Claims(tmp_path / "out" / CLAIMS) as claims:
        claims.take("0")
        jobs = [start(made, tmp_path / "out", *more) for more in (("--workers", "2"), ())]
        for job in jobs:
            assert job.stderr.readline() == "embedder: another job makes it; waiting\n"
        assert not (tmp_path / "out" / "embedder").exists()
    said = [job.communicate(timeout=300)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert sum("counting words: 100%" in text for text in said) == 1
    assert bytes_of(tmp_path / "out") == bytes_of(made / "embeddings")
    vectors = map_block(tmp_path / "out" / block_name(3))["vectors"]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert len(ReferenceStore.open(made / "references")) == 10 * (len(list((tmp_path / "out").glob("*.safetensors"))))


def test_a_killed_job_is_taken_over(made, tmp_path):
    output = tmp_path / "out"
    job = start(made, output)
    while not list(output.glob("block_*.json")):
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.002)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("block_*.json")}
    assert 0 < len(kept) < COUNT // 10
    assert not (output / "manifest.json").exists()
    embed.main(arguments(made, output))
    assert bytes_of(output) == bytes_of(made / "embeddings")
    after = {name: (output / name).stat().st_mtime_ns for name in kept}
    assert after == kept


def test_an_embedder_that_cannot_be_made_leaves_nothing_while_others_wait_too(made, tmp_path):
    jobs = [start(made, tmp_path / "out", "--embedder", "transformer", "--model", "none", "--workers", workers)
            for workers in "12"]
    said = [job.communicate(timeout=300)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [2, 2], said
    assert [text.splitlines()[-1][:18] for text in said] == ["error: model=none:"] * 2
    assert not (tmp_path / "out").exists()


def test_each_worker_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "")
    for number, gpus, rank in ((None, 2, ""), (3, 0, ""), (1, 2, "1"), (5, 2, "1"), (4, 2, "0")):
        monkeypatch.setattr(shared_work, "_number", number)
        monkeypatch.setattr(platform, "count_gpus", lambda gpus=gpus: gpus)
        shared_work.take_gpu()
        assert os.environ["LOCAL_RANK"] == rank
    for workers, gpus in ((1, 0), (8, 0), (2, 2), (1, 4)):
        embed.check_workers(workers, gpus)
    with pytest.raises(ConfigError, match="workers=3: each takes a GPU of its own, and 2 can be seen"):
        embed.check_workers(3, 2)
