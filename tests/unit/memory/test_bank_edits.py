"""Editing a bank: it holds what a bank built anew holds, whatever dies on the way, and readers are not disturbed."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_m3.errors import ArtifactError, ConfigError, DataError
from tests.tiny_model import sentence

REPLACED, DELETED, ADDED = [5, 9, 200], [3, 7, 399], range(400, 430)


@pytest.fixture(scope="module")
def run(folder, loaded):
    """The tiny model's checkpoint."""
    from megatron_m3.model.checkpoint import save_checkpoint

    data = replace(loaded.config.data, tokenizer=str(folder / "tokenizer"))
    save_checkpoint(folder / "run", 1, [loaded.model], replace(loaded.config, data=data))
    return folder / "run"


def texts(path, count, seed):
    lines = [json.dumps({"id": f"{seed}:{place}", "text": sentence(seed + place, 7)}) for place in range(count)]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def edit(folder):
    """Edit a knowledge base: edit(base, name, *options) -> its folder."""
    from data_tools.edit_references import main

    def edit(base, name, *options):
        words = [str(word) for word in options]
        words += ["--tokenizer", str(folder / "tokenizer")] if {"--add", "--replace"} & set(words) else []
        main(["--references", str(base), "--output", str(folder / name), *words])
        return folder / name

    return edit


@pytest.fixture(scope="module")
def edited(folder, references, edit):
    """The knowledge base with references replaced, deleted and added, in two steps."""
    first = edit(references.folder, "R1", "--replace", "5,9,200", "--by", texts(folder / "by.jsonl", 3, 5000))
    return edit(first, "R2", "--delete", "3,7,399", "--add", texts(folder / "add.jsonl", 30, 6000))


@pytest.fixture(scope="module")
def build(run):
    """Build a bank: build(references, output, *options) -> its folder."""
    from launch.build_bank import main

    def build(references, output, *options):
        main(["--checkpoint", str(run), "--references", str(references), "--output", str(output), "--block-size", "64",
              *map(str, options)])
        return output

    return build


@pytest.fixture(scope="module")
def built(folder, references, build):
    """A bank of the knowledge base before it was edited, of each codec."""
    build(references.folder, folder / "none", "--codec", "none")
    build(references.folder, folder / "coded", "--codec", "KLT6")
    return folder


@pytest.fixture(scope="module")
def updated(built, edited, run):
    """The same banks after an update."""
    for codec in ("none", "coded"):
        shutil.copytree(built / codec, built / f"updated_{codec}")
        update(built / f"updated_{codec}", edited, run)
    return built


def update(bank, references, run=None, word="update"):
    from launch.m3 import main

    main(["bank", word, "--bank", str(bank), "--references", str(references),
          *(["--checkpoint", str(run)] if run else [])])


def copy_of(bank, tmp_path):
    shutil.copytree(bank, tmp_path / "bank")
    return tmp_path / "bank"


def open_bank(folder, **options):
    from megatron_m3.memory import MemoryBank

    return MemoryBank.open(folder, **options)


def compact(folder):
    from megatron_m3.memory.editing import compact_bank

    return compact_bank(folder)


def delete(folder, ids):
    from megatron_m3.memory.editing import delete_references

    return delete_references(folder, np.array(ids))


def records(folder):
    bank = open_bank(folder, check=True)
    return bank.records(range(len(bank)))


def digest(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def is_empty(memories):
    return (memories.num_kept == 0) & (memories.kv == 0).flatten(1).all(1)


def test_an_updated_bank_holds_the_edited_references(updated, edited, loaded, references):
    from megatron_m3.memory import encode_references
    from megatron_m3.references import ReferenceStore

    store, bank = ReferenceStore.open(edited), open_bank(updated / "updated_none", check=True)
    assert len(bank) == len(store) == 430
    assert bank.manifest.inputs["references"] == store.hash
    fresh, read = encode_references(loaded, *store.tokens(range(430))), bank.read(range(430))
    torch.testing.assert_close(read.kv, fresh.kv, rtol=1e-5, atol=1e-5)
    assert torch.equal(read.positions, fresh.positions)
    assert torch.equal(read.num_kept, fresh.num_kept)
    assert np.flatnonzero(is_empty(read)).tolist() == DELETED
    before = open_bank(updated / "none").read(range(400))
    changed = (before.kv != read.kv[:400]).flatten(1).any(1)
    assert np.flatnonzero(changed).tolist() == sorted(REPLACED + DELETED)
    one_head = bank.read([5, 3, 429, 0], kv_heads=slice(1, 2))
    assert torch.equal(one_head.kv, read.kv[[5, 3, 429, 0], :, :, 1:2])


def test_only_what_is_new_is_written(updated):
    before, after = digest(updated / "none"), digest(updated / "updated_none")
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}
    new = {name for name in after.keys() - before.keys() if name.endswith(".bin")}
    record = open_bank(updated / "none").record_bytes
    assert sorted((updated / "updated_none" / name).stat().st_size for name in new) == [record, 33 * record]


@pytest.mark.parametrize("codec", ["none", "coded"])
def test_compacted_it_is_a_bank_built_anew_byte_for_byte(updated, edited, build, tmp_path, codec):
    bank = copy_of(updated / f"updated_{codec}", tmp_path)
    before = records(bank)
    assert "33 memories" not in compact(bank)
    anew = open_bank(build(edited, tmp_path / "anew", "--codec-from", updated / codec))
    found = open_bank(bank, check=True)
    assert found.settings == anew.settings
    assert found.manifest.inputs == anew.manifest.inputs
    assert [found.manifest.files[name] for name in found.places.shards] == [
        anew.manifest.files[name] for name in anew.places.shards]
    assert (records(bank) == before).all()
    named = {*found.manifest.files, "manifest.json", "job.json"}
    assert {name for name in digest(bank) if not name.endswith(".json")} <= named
    assert not list(bank.glob("edit_*"))
    assert "no edits" in compact(bank)


def test_steps_one_by_one_and_at_once_are_the_same(updated, folder, edited, run, tmp_path):
    bank = copy_of(folder / "coded", tmp_path)
    update(bank, folder / "R1", run)
    compact(bank)
    update(bank, edited, run)
    compact(bank)
    at_once = tmp_path / "at_once"
    shutil.copytree(updated / "updated_coded", at_once)
    compact(at_once)
    assert (records(bank) == records(at_once)).all()


def test_readers_go_on_while_the_bank_is_edited(built, edited, run, tmp_path):
    bank = copy_of(built / "coded", tmp_path)
    early, late = open_bank(bank), open_bank(bank)
    before = early.read(range(400))
    update(bank, edited, run)
    again = early.read(range(400))
    assert torch.equal(again.kv, before.kv)
    compact(bank)
    assert torch.equal(early.read(range(400)).kv, before.kv), "open files stay"
    now = late.read(range(400))
    others = np.setdiff1d(np.arange(400), REPLACED + DELETED)
    assert torch.equal(now.kv[others], before.kv[others]), "what was not edited is the same for who opens files late"
    assert np.flatnonzero(is_empty(now)).tolist() == DELETED
    late.read([0])
    (bank / open_bank(bank).places.shards[1]).unlink()
    with pytest.raises(ArtifactError, match="No such file"):
        open_bank_unchecked(bank).read([64])


def open_bank_unchecked(folder):
    """A bank whose file is lost after it was opened."""
    from megatron_m3.manifest import read_manifest
    from megatron_m3.memory.bank import KIND, SCHEMA, BankSettings, MemoryBank
    from megatron_m3.memory.codecs import load_codec
    from megatron_m3.memory.storage import LocalStorage

    manifest = read_manifest(folder, KIND, SCHEMA)
    settings = BankSettings.from_dict(manifest.settings)
    codec = load_codec(folder / "codec", settings.memory_lists)[0]
    return MemoryBank(str(folder), manifest, settings, codec, LocalStorage(folder))


def test_deleting_needs_no_model_and_is_at_once(built, edited, folder, run, references, tmp_path, capsys):
    from launch.m3 import main

    bank = copy_of(built / "coded", tmp_path)
    main(["bank", "delete", "--bank", str(bank), "--ids", "5,100-102"])
    assert "4 memories deleted, 4 in all" in capsys.readouterr().out
    assert "0 memories deleted, 4 in all" in delete(bank, [5])
    whole = ["bank", "delete", "--bank", str(bank), "--references", str(references.folder), "--document"]
    main([*whole, references.source(11)[0]])
    assert np.flatnonzero(is_empty(open_bank(bank, check=True).read(range(400)))).tolist() == [5, 11, 100, 101, 102]
    with pytest.raises(DataError, match="no reference is of a document 'x'"):
        main([*whole, "x"])
    with pytest.raises(DataError, match="reference 400 is not in 0-399"):
        delete(bank, [3, 400])
    update(bank, edited, run)
    bank_ids = np.flatnonzero(is_empty(open_bank(bank, check=True).read(range(430)))).tolist()
    assert bank_ids == [3, 7, 11, 100, 101, 102, 399], "a replaced reference lives again, other deleted ones do not"
    compact(bank)
    assert np.flatnonzero(is_empty(open_bank(bank, check=True).read(range(430)))).tolist() == bank_ids


def test_deletions_alone_take_no_checkpoint(built, references, edit, tmp_path):
    bank = copy_of(built / "coded", tmp_path)
    update(bank, edit(references.folder, "R_less", "--delete", "1-2"))
    assert np.flatnonzero(is_empty(open_bank(bank).read(range(400)))).tolist() == [1, 2]
    assert not list(bank.glob("edit_*"))


def test_add_and_replace_refuse_other_edits(built, folder, references, edited, run, tmp_path):
    bank = copy_of(built / "coded", tmp_path)
    with pytest.raises(ConfigError, match="references 5,9,200 were replaced too; `m3 bank update` follows every edit"):
        update(bank, edited, run, "add")
    with pytest.raises(ConfigError, match="references 400-429 were added too"):
        update(bank, edited, run, "replace")
    assert digest(bank) == digest(built / "coded")
    update(bank, folder / "R1", run, "replace")
    with pytest.raises(ArtifactError, match=r"is not the knowledge base .* nor an edited one of it"):
        update(bank, references.folder, run)
    with pytest.raises(ConfigError, match="checkpoint: missing; 30 references are to be encoded"):
        update(bank, edited)


@pytest.fixture(scope="module")
def other(folder, references, build, built, edit):
    """Another knowledge base and its bank with the same codec, and both knowledge bases as one."""
    from data_tools import references as cut

    cut.main(["--input", texts(folder / "other.jsonl", 100, 7000), "--tokenizer", str(folder / "tokenizer"), "--output",
              str(folder / "S"), "--reference-length", "16"])
    build(folder / "S", folder / "other", "--codec-from", built / "coded")
    return edit(references.folder, "RS", "--append", folder / "S")


@pytest.mark.parametrize("is_edited", [False, True])
def test_merging_takes_records_without_encoding(folder, other, built, build, tmp_path, is_edited):
    from launch.m3 import main

    bank = copy_of(built / "coded", tmp_path)
    shutil.copytree(folder / "other", tmp_path / "other")
    if is_edited:
        delete(tmp_path / "other", [70])
        delete(bank, [399])
    main(["bank", "merge", "--bank", str(bank), "--other", str(tmp_path / "other"), "--references", str(other)])
    wanted = np.concatenate([records(folder / "coded"), records(folder / "other")])
    found, deleted = records(bank), [399, 470] if is_edited else []
    assert np.flatnonzero((found != wanted).any(1)).tolist() == deleted
    shared = [path for path in bank.glob("edit_*/*.bin") if path.stat().st_nlink > 1]
    assert len(shared) == (1 if is_edited else 2)
    shutil.rmtree(tmp_path / "other")
    compact(bank)
    assert (records(bank) == found).all()
    if not is_edited:
        anew = build(other, tmp_path / "anew", "--codec-from", built / "coded")
        assert (records(anew) == found).all()


def test_merging_refuses_what_does_not_fit(folder, other, built, edited, build, tmp_path):
    from megatron_m3.memory.update import merge_bank

    bank = copy_of(built / "coded", tmp_path)
    strange = build(folder / "S", tmp_path / "strange", "--codec", "KLT6", "--codec-sample", "90")
    with pytest.raises(ArtifactError, match=r"has another codec than .*build it with --codec-from"):
        merge_bank(bank, strange, other)
    with pytest.raises(ArtifactError, match=r"R2: is not the knowledge base of .* appended"):
        merge_bank(bank, folder / "other", edited)
    assert digest(bank) == digest(built / "coded")


def test_a_build_does_not_undo_edits(built, references, build, tmp_path):
    bank = copy_of(built / "coded", tmp_path)
    delete(bank, [4])
    for _ in range(2):
        before = digest(bank)
        with pytest.raises(ArtifactError, match="edited since it was built"):
            build(references.folder, bank, "--codec", "KLT6")
        assert digest(bank) == before
        compact(bank)


def test_a_sample_of_an_edited_bank_verifies(updated, edited, run, tmp_path, capsys):
    from launch.verify_bank import main

    bank = copy_of(updated / "updated_none", tmp_path)
    for _ in range(2):
        main(["--bank", str(bank), "--checkpoint", str(run), "--references", str(edited), "--sample", "430"])
        assert "430 references drawn and encoded again: the same bits" in capsys.readouterr().out
        compact(bank)
    path = bank / open_bank(bank).places.shards[0]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"folded_\w+/shard_000000.bin: checksum.*bring the file back from a copy"):
        open_bank(bank, check=True)


def in_child(do) -> int:
    """Run ``do`` in a forked process; its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        do()
        os._exit(0)
    except BaseException:
        os._exit(7)


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"}


def killed_before_change(number: int, folder: Path, do) -> bool:
    """Run ``do`` in a process that is killed just before its ``number``-th change in ``folder``; false if it ended."""

    def child() -> None:
        count = 0

        def hook(event: str, arguments) -> None:
            nonlocal count
            writes = event == "open" and arguments[2] and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (event in CHANGES or writes) and str(folder) in str(arguments[0]):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        do()

    status = in_child(child)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


@pytest.mark.parametrize("what", ["update", "compact", "delete"])
def test_killed_before_any_change_it_is_the_old_bank_or_the_new(built, updated, edited, run, loaded, tmp_path, what):
    from mpi4py import MPI

    from megatron_m3.memory.update import update_bank

    def do(bank):
        if what == "update":
            update_bank(bank, edited, run, MPI.COMM_SELF, lambda path: loaded)
        elif what == "compact":
            compact(bank)
        else:
            delete(bank, [8])

    start = built / "coded" if what == "update" else updated / "updated_coded"
    done = tmp_path / "done"
    shutil.copytree(start, done)
    do(done)
    old, new, wanted = records(start), records(done), digest(done)
    seen = set()
    for number in range(1, 1000):
        bank = tmp_path / f"bank_{number}"
        shutil.copytree(start, bank)
        was_killed = killed_before_change(number, bank, lambda: do(bank))  # noqa: B023
        found = open_bank(bank).hash
        assert found in (open_bank(start).hash, open_bank(done).hash)
        assert np.array_equal(records(bank), old if found == open_bank(start).hash else new)
        seen.add(found)
        do(bank)
        assert digest(bank) == wanted
        shutil.rmtree(bank)
        if not was_killed:
            break
    assert len(seen) == 2
    assert number > 5


def test_killed_at_random_again_and_again_it_gets_done(updated, tmp_path):
    bank, done = tmp_path / "bank", tmp_path / "done"
    for folder in (bank, done):
        shutil.copytree(updated / "updated_coded", folder)
    start = time.monotonic()
    compact(done)
    length, old = time.monotonic() - start, records(updated / "updated_coded")
    draw, kills = random.Random(1), 0
    while open_bank(bank).settings.edits and kills < 100:
        child = os.fork()
        if not child:
            os.close(2)
            compact(bank)
            os._exit(0)
        time.sleep(draw.uniform(0, length * 1.2))
        os.kill(child, signal.SIGKILL)
        kills += os.waitpid(child, 0)[1] == signal.SIGKILL
        assert np.array_equal(records(bank), old)
    assert kills
    compact(bank)
    assert digest(bank) == digest(done)


def test_a_full_disk_leaves_the_bank_as_it_was(updated, tmp_path):
    """The limit on file size stands for the full disk."""
    bank = copy_of(updated / "updated_coded", tmp_path)
    before = digest(bank)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        with pytest.raises(OSError, match="File too large") as error:
            compact(bank)
        assert "shard_" in str(error.value.filename)

    assert in_child(limited) == 0
    after = digest(bank)
    assert {name: after[name] for name in before} == before
    assert all(name.endswith(".json") for name in after.keys() - before.keys())
    compact(bank)
    assert "folded" in next(iter(open_bank(bank, check=True).places.shards))
