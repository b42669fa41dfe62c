"""Editing a bank: it holds what a bank built anew holds, and readers are not disturbed."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_m3.errors import ArtifactError, ConfigError, DataError
from megatron_m3.manifest import read_manifest, write_manifest
from tests.edited_banks import compact, copy_of, delete, digest, open_bank, records, texts, update

REPLACED, DELETED = [5, 9, 200], [3, 7, 399]


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
    with pytest.raises(DataError, match="there is no reference 400, ids are 0-399"):
        main(["bank", "delete", "--bank", str(bank), "--ids", "3-400"])
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


def test_edits_that_lie_outside_the_bank_are_refused(updated, tmp_path):
    bank = copy_of(updated / "updated_none", tmp_path)
    manifest = read_manifest(bank, "bank", 2)
    folder, *more = manifest.settings["edits"]["folders"]
    edits = manifest.settings["edits"] | {"folders": [folder | {"name": "../bank"}, *more]}
    write_manifest(bank, replace(manifest, settings=manifest.settings | {"edits": edits}))
    with pytest.raises(ArtifactError, match="does not say where all records are"):
        open_bank(bank)


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
