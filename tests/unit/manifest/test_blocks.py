"""Block files: a job that stops anywhere goes on, and nobody else's blocks are taken for its own."""

import resource
from pathlib import Path

import numpy as np
import pytest

from megatron_m3.errors import ArtifactError
from megatron_m3.manifest import BlockFolder, block_name, hash_file, map_block

JOB = {"kind": "embeddings", "inputs": {"references": "ab"}, "settings": {"size": 4}}


def fill(folder: Path, blocks: list[int]) -> BlockFolder:
    """Write some blocks of the job."""
    writer = BlockFolder(folder, JOB)
    for index in blocks:
        arrays = {"vectors": np.full((3, 4), index, np.float32), "valid": np.array([True, False, True])}
        writer.write(index, arrays, {"count": index})
    return writer


def test_blocks_come_back_as_written_and_read_only(tmp_path: Path) -> None:
    fill(tmp_path, [0, 1])
    arrays = map_block(tmp_path / block_name(1))
    np.testing.assert_array_equal(arrays["vectors"], np.full((3, 4), 1, np.float32))
    np.testing.assert_array_equal(arrays["valid"], [True, False, True])
    with pytest.raises(ValueError, match="read-only"):
        arrays["vectors"][0] = 0


def test_a_job_goes_on_where_blocks_are_missing(tmp_path: Path) -> None:
    writer = fill(tmp_path, [0, 1, 3])
    assert writer.missing(5) == [2, 4]
    (tmp_path / block_name(1)).unlink()
    (tmp_path / block_name(3)).with_suffix(".json").unlink()
    assert BlockFolder(tmp_path, JOB).missing(5) == [1, 2, 3, 4]


def test_a_block_that_is_kept_is_told_to_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "nothing_kept"
    told.touch()
    monkeypatch.setenv("M3_STANDSTILL", str(told))
    writer = BlockFolder(tmp_path / "blocks", JOB)
    with pytest.raises(RuntimeError), writer.writing(0, {}):
        raise RuntimeError
    assert told.exists()
    fill(tmp_path / "blocks", [0])
    assert not told.exists()


def test_resumed_blocks_are_the_same_bytes_as_never_interrupted(tmp_path: Path) -> None:
    whole, resumed = fill(tmp_path / "a", [0, 1, 2]), fill(tmp_path / "b", [2])
    assert fill(tmp_path / "b", resumed.missing(3)).files(3) == whole.files(3)
    assert [info["count"] for info in resumed.info(3)] == [0, 1, 2]
    assert whole.files(3)[block_name(1)] == hash_file(tmp_path / "a" / block_name(1))


def test_a_truncated_block_counts_as_missing_and_cannot_be_read(tmp_path: Path) -> None:
    writer, path = fill(tmp_path, [0]), tmp_path / block_name(0)
    for size in (path.stat().st_size - 1, 9, 0):
        path.write_bytes(path.read_bytes()[:size])
        assert writer.missing(1) == [0]
        with pytest.raises(ArtifactError, match="not a readable block file"):
            map_block(path)


def test_another_jobs_blocks_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, [0])
    with pytest.raises(ArtifactError, match="other inputs or settings"):
        BlockFolder(tmp_path, JOB | {"settings": {"size": 8}})


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="not empty, and not begun by this job"):
        BlockFolder(tmp_path, JOB)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_block_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    writer = fill(tmp_path, [])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            writer.write(0, {"vectors": np.ones(1000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]
    assert writer.missing(1) == [0]


def test_a_changed_block_is_found_by_its_checksum(tmp_path: Path) -> None:
    writer, path = fill(tmp_path, [0]), tmp_path / block_name(0)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert writer.done(0)
    assert not writer.done(0, checksum=True)
    fill(tmp_path, [0])
    assert writer.done(0, checksum=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", "\udcff"])
def test_broken_records_are_named_with_the_mend(tmp_path: Path, text: str) -> None:
    writer, data = fill(tmp_path, [0]), text.encode("utf-8", "surrogateescape")
    (tmp_path / "block_000000.json").write_bytes(data)
    for read in (writer.missing, writer.files, lambda count: list(writer.info(count))):
        with pytest.raises(ArtifactError, match=r"block_000000\.json: damaged.*remove it and run the job again"):
            read(1)
    (tmp_path / "job.json").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"job\.json: damaged.*choose another folder"):
        BlockFolder(tmp_path, JOB)
