"""Artifacts on disk: whole or absent, and refused when they are not what they say."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_m3.errors import ArtifactError
from megatron_m3.manifest import (
    Manifest,
    atomic_folder,
    atomic_path,
    check_files,
    check_input,
    hash_file,
    is_finished,
    read_manifest,
    write_manifest,
)
from megatron_m3.manifest.process import place
from tests.launcher import ended_process

INPUTS, SETTINGS = {"tokenizer": "ab" * 32}, {"length": 128}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished artifact of one file."""
    artifact = tmp_path / "references"
    artifact.mkdir()
    (artifact / "data.bin").write_bytes(bytes(range(256)))
    write_manifest(artifact, Manifest(kind="references", schema=1, inputs=INPUTS, settings=SETTINGS,
                                      files={"data.bin": hash_file(artifact / "data.bin")}, info={"count": 2}))
    return artifact


def edit(folder: Path, **changes: object) -> None:
    """Change fields of a manifest behind its back."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_manifest_comes_back_as_written(folder: Path) -> None:
    manifest = read_manifest(folder, "references", 1)
    assert (manifest.inputs, manifest.settings, manifest.info) == (INPUTS, SETTINGS, {"count": 2})
    check_files(folder, manifest, checksums=True)


def test_notes_do_not_change_the_hash_but_everything_else_does() -> None:
    fields = {"kind": "bank", "schema": 1, "inputs": INPUTS, "settings": SETTINGS, "files": {}}
    base = Manifest(**fields)
    assert Manifest(**fields, info={"seconds": 3}).hash == base.hash
    changes = ({"kind": "codec"}, {"schema": 2}, {"inputs": {}}, {"settings": {"length": 64}}, {"files": {"a": {}}})
    for change in changes:
        assert Manifest(**fields | change).hash != base.hash


@pytest.mark.parametrize(("kind", "schema", "message"), [
    ("neighbours", 1, "is of kind references, not neighbours"),
    ("references", 2, "schema 1, this version reads 2"),
])
def test_another_kind_or_schema_is_refused(folder: Path, kind: str, schema: int, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_manifest(folder, kind, schema)


def test_missing_folders_and_unfinished_ones_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        read_manifest(tmp_path / "absent", "bank", 1)
    with pytest.raises(ArtifactError, match=r"no manifest\.json: unfinished, or not of kind bank"):
        read_manifest(tmp_path, "bank", 1)


def test_a_tampered_manifest_is_refused(folder: Path) -> None:
    edit(folder, settings={"length": 64})
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        read_manifest(folder, "references", 1)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"hash": "a", "colour": 1}', "\x00\xff"])
def test_an_unreadable_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match="not a readable manifest"):
        read_manifest(folder, "references", 1)


def test_damaged_files_are_named(folder: Path) -> None:
    manifest, data = read_manifest(folder, "references", 1), folder / "data.bin"
    flipped = bytearray(data.read_bytes())
    flipped[100] ^= 1
    data.write_bytes(flipped)
    check_files(folder, manifest)
    with pytest.raises(ArtifactError, match=r"data\.bin: checksum differs"):
        check_files(folder, manifest, checksums=True)
    data.write_bytes(flipped[:-1])
    with pytest.raises(ArtifactError, match=r"data\.bin: 255 bytes, the manifest says 256"):
        check_files(folder, manifest)
    data.unlink()
    with pytest.raises(ArtifactError, match=r"data\.bin: missing"):
        check_files(folder, manifest)


def test_an_artifact_of_another_input_is_refused(folder: Path) -> None:
    manifest = read_manifest(folder, "references", 1)
    check_input(folder, manifest, "tokenizer", "ab" * 32)
    with pytest.raises(ArtifactError, match="made from another tokenizer"):
        check_input(folder, manifest, "tokenizer", "cd" * 32)
    with pytest.raises(ArtifactError, match="made from another corpus"):
        check_input(folder, manifest, "corpus", "cd" * 32)


def test_a_finished_job_is_known_and_another_one_refused(folder: Path, tmp_path: Path) -> None:
    assert is_finished(folder, "references", 1, INPUTS, SETTINGS)
    assert not is_finished(tmp_path / "new", "references", 1, INPUTS, SETTINGS)
    with pytest.raises(ArtifactError, match="other inputs or settings"):
        is_finished(folder, "references", 1, INPUTS, {"length": 64})
    (folder / "data.bin").unlink()
    with pytest.raises(ArtifactError, match="missing"):
        is_finished(folder, "references", 1, INPUTS, SETTINGS)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"

    def stopped_halfway() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("tw")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stopped_halfway()
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "index"

    def stopped_halfway() -> None:
        with atomic_folder(folder) as temporary:
            np.save(temporary / "half.npy", np.arange(3))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stopped_halfway()
    assert not list(tmp_path.iterdir())
    with atomic_folder(folder) as temporary:
        (temporary / "whole").write_text("yes")
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    with pytest.raises(ArtifactError, match="exists already"), atomic_folder(folder):
        pass
    assert (folder / "whole").read_text() == "yes"


def test_a_folder_that_is_made_is_told_to_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "nothing_kept"
    told.touch()
    monkeypatch.setenv("M3_STANDSTILL", str(told))
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "index"):
        raise RuntimeError
    assert told.exists()
    for name in ("one", "other"):
        with atomic_folder(tmp_path / name):
            pass
        assert not told.exists()


@pytest.mark.parametrize("target", ["empty", "new"])
def test_a_folder_behind_a_link_is_made_where_the_link_leads(tmp_path: Path, target: str) -> None:
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    link = tmp_path / "index"
    link.symlink_to(tmp_path / "disk" / target)
    with atomic_folder(link) as temporary:
        (temporary / "whole").touch()
    assert link.is_symlink()
    assert (tmp_path / "disk" / target / "whole").exists()


def write_slowly(folder: Path, number: int, setting: int) -> None:
    """Write an artifact while another process writes one to the same place, and say what came of it."""
    here = folder.parent
    try:
        with atomic_folder(folder) as temporary:
            (temporary / f"of_{number}").write_text(str(setting))
            (here / f"began_{number}").touch()
            while not ((here / "began_0").exists() and (here / "began_1").exists()):
                time.sleep(0.01)
            while number and not folder.exists():
                time.sleep(0.01)
            write_manifest(temporary, Manifest(kind="test", schema=1, inputs={}, settings={"it": setting}, files={}))
        said = "made"
    except ArtifactError as error:
        said = str(error)
    (here / f"said_{number}").write_text(said)


@pytest.mark.parametrize(("setting", "said"), [(1, "made"), (2, "another process made it meanwhile, of something els")])
def test_two_processes_that_write_one_folder_do_not_mix(tmp_path: Path, setting: int, said: str) -> None:
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=write_slowly, args=(tmp_path / "a.b", *one)) for one in ((0, 1), (1, setting))]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(path.name for path in (tmp_path / "a.b").iterdir()) == ["manifest.json", "of_0"]
    assert (tmp_path / "said_0").read_text() == "made"
    assert said in (tmp_path / "said_1").read_text()
    assert not list(tmp_path.glob(".*"))


def test_what_dead_processes_left_of_a_folder_goes_and_what_others_write_stays(tmp_path: Path) -> None:
    here, dead, folder = place(), ended_process(), tmp_path / "index"
    left = [f".index.{here}.{dead}.tmp", f".index.{here}.{os.getpid()}.tmp"]
    kept = [f".index.{here}.{os.getppid()}.tmp", f".index.other.{dead}.tmp", f".other.{here}.{dead}.tmp",
            f".index.{here}.x.tmp"]
    for name in [*left, *kept]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with atomic_folder(folder) as temporary:
        assert not list(temporary.iterdir())
    assert sorted(path.name for path in tmp_path.glob(".*")) == sorted(kept)


def test_a_write_that_fails_names_the_file_that_was_wanted(tmp_path: Path) -> None:
    path = tmp_path / "a_folder"
    path.mkdir()
    with pytest.raises(IsADirectoryError) as error, atomic_path(path) as temporary:
        temporary.write_text("one")
    assert (error.value.filename, error.value.filename2) == (str(path), None)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError) as error, atomic_path(path):
        (tmp_path / "other").read_text()
    assert str(error.value.filename) == str(tmp_path / "other")
