"""A sample of a bank, encoded again: every bit is the model's, and what checksums cannot see is found."""

import collections
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_m3.errors import ArtifactError, ConfigError
from megatron_m3.manifest import hash_file, read_manifest, write_manifest

HEADS = 4
"""Lists of a reference: 2 memory layers of 2 heads."""


@pytest.fixture(scope="module")
def banks(folder, run, references):
    """A finished bank of each codec."""
    from launch.build_bank import main

    for codec in ("none", "PQ8x4", "KLT6"):
        main(["--checkpoint", str(run), "--references", str(references.folder), "--output", str(folder / codec),
              "--codec", codec, "--block-size", "150", "--batch-tokens", "500"])
    return folder


@pytest.fixture
def verify(run, references, capsys):
    """Run the command: verify(bank, *options) -> (exit status, text)."""
    from launch.verify_bank import main

    def verify(bank, *options):
        given = ["--bank", str(bank), "--checkpoint", str(run), "--references", str(references.folder), "--sample"]
        capsys.readouterr()
        try:
            main([*given, *map(str, options)])
        except SystemExit as end:
            return end.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return verify


def change(folder, id, place, value=None):
    """Change one byte of a record, or one bit of it, and make all checksums fit."""
    from megatron_m3.memory import MemoryBank

    bank = MemoryBank.open(folder)
    block, row = divmod(id, bank.settings.block_size)
    path = folder / f"shard_{block:06d}.bin"
    records = np.fromfile(path, np.uint8).reshape(-1, bank.record_bytes)
    records[row, place] = records[row, place] ^ 1 if value is None else value
    changed = records[row : row + 1]
    bank.record.fields(changed)[3][:] = bank.record.checksums(changed).view(np.uint8)
    records.tofile(path)
    manifest = read_manifest(folder, "bank", 2)
    write_manifest(folder, replace(manifest, files=manifest.files | {path.name: hash_file(path)}))


@pytest.fixture
def copy(banks, tmp_path):
    """A copy of a bank, to be damaged."""
    def copy(codec):
        shutil.copytree(banks / codec, tmp_path / codec)
        return tmp_path / codec

    return copy


@pytest.mark.parametrize("codec", ["none", "PQ8x4", "KLT6"])
@pytest.mark.parametrize(("sample", "shown"), [(37, 37), (1000, 400)])
def test_an_undamaged_bank_has_the_same_bits(banks, verify, codec, sample, shown):
    """Also where references are encoded in other batches than in the build, which changes last bits."""
    status, text = verify(banks / codec, sample)
    assert status == 0
    assert "all files have their sizes; 400 memories" in text
    assert f"{shown} references drawn and encoded again: the same bits" in text


@pytest.mark.parametrize("codec", ["none", "PQ8x4", "KLT6"])
def test_a_changed_code_with_fitting_checksums_is_found(copy, verify, codec):
    from launch.verify_bank import main

    bank = copy(codec)
    change(bank, 210, 3)
    main(["--bank", str(bank)])
    status, text = verify(bank, 400)
    assert status == 1
    assert f"1 differ (210), in 1 of {400 * HEADS:,} heads, of which 0 keep other tokens" in text
    assert "NOT what the model writes" in text


def test_a_deleted_memory_is_empty_as_it_should_be(copy, verify):
    from megatron_m3.memory.editing import delete_references

    bank = copy("KLT6")
    delete_references(bank, np.arange(100, 160))
    status, text = verify(bank, 400)
    assert (status, "400 references drawn and encoded again: the same bits" in text) == (0, True)
    change(bank, 210, 3)
    assert verify(bank, 400)[0] == 1


def test_a_sample_sees_what_it_drew(copy, verify):
    from megatron_m3.memory.verify import draw_sample

    bank = copy("PQ8x4")
    drawn = draw_sample(20, 400, 5)
    other = next(id for id in range(400) if id not in drawn)
    change(bank, other, 3)
    assert verify(bank, 20, "--seed", 5)[0] == 0
    change(bank, int(drawn[7]), 3)
    assert verify(bank, 20, "--seed", 5)[0] == 1


def test_a_sample_reads_only_its_records_and_all_reads_everything(copy, verify):
    from megatron_m3.memory import MemoryBank
    from megatron_m3.memory.verify import draw_sample

    bank = copy("PQ8x4")
    drawn, size = draw_sample(20, 400, 0), MemoryBank.open(bank).record_bytes
    other = next(id for id in range(150) if id not in drawn)
    data = bytearray((bank / "shard_000000.bin").read_bytes())
    data[other * size] ^= 1
    (bank / "shard_000000.bin").write_bytes(data)
    status, text = verify(bank, 20, "--json")
    found = json.loads(text)
    assert (status, found["memories"], found["shards"], found["checksums"]) == (0, 400, 3, False)
    assert (found["sample"]["references"], found["sample"]["different"], found["sample"]["accepted"]) == (20, [], True)
    with pytest.raises(ArtifactError, match=r"shard_000000.bin: checksum differs"):
        verify(bank, 20, "--all")


def test_json_tells_what_differs(copy, verify):
    bank = copy("none")
    change(bank, 7, 1)
    status, text = verify(bank, 400, "--json", "--all")
    found, sample = json.loads(text), json.loads(text)["sample"]
    assert (status, found["checksums"], sample["different"], sample["accepted"]) == (1, True, [7], False)
    assert sample["largest_error"] > 0


def test_a_tolerance_accepts_small_errors_of_the_same_tokens(copy, verify):
    from megatron_m3.memory import MemoryBank

    bank = copy("none")
    change(bank, 7, 1)  # a low bit of an fp32 number
    assert verify(bank, 400)[0] == 1
    status, text = verify(bank, 400, "--tolerance", 0.01)
    assert (status, "1 differ (7)" in text, "within the tolerance 0.01" in text) == (0, True, True)
    change(bank, 9, 3, 0x42)  # its exponent
    status, text = verify(bank, 400, "--tolerance", 0.01)
    assert (status, "2 differ (7, 9), in 2 of" in text) == (1, True)
    moved = copy("PQ8x4")
    change(moved, 3, MemoryBank.open(moved).record.codes_bytes)
    status, text = verify(moved, 400, "--tolerance", 100)
    assert (status, "1 differ (3), in 1 of 1,600 heads, of which 1 keep other" in text) == (1, True)


def test_the_largest_error_is_the_lists(copy, verify, memories):
    """A value of the codec none is set to 2: the error of that list's keys is known."""
    bank = copy("none")
    change(bank, 11, slice(0, 4), np.frombuffer(np.float32(2).tobytes(), np.uint8))
    keys = memories.kv[11, 0, 0, 0]
    error = float((2 - keys.flatten()[0]).abs() / keys.norm())
    assert f"values {error:.2g};" in verify(bank, 400)[1]


def test_another_model_or_references_are_refused(banks, folder, loaded, run, references, tmp_path, verify):
    from launch.verify_bank import main
    from megatron_m3.model.checkpoint import save_checkpoint
    from tests.knowledge import build_knowledge

    weight = loaded.model.decoder.layers[0].self_attention.linear_qkv.weight
    data = replace(loaded.config.data, tokenizer=str(folder / "tokenizer"))
    healthy = weight.detach().clone()
    try:
        weight.data[0] += 1
        save_checkpoint(tmp_path / "run", 1, [loaded.model], replace(loaded.config, data=data))
    finally:
        weight.data.copy_(healthy)
    words = ["--bank", str(banks / "PQ8x4"), "--sample", "5", "--checkpoint"]
    with pytest.raises(ArtifactError, match="made from another checkpoint"):
        main([*words, str(tmp_path / "run"), "--references", str(references.folder)])
    build_knowledge(tmp_path, folder / "tokenizer", count=4, words=5, reference_length=16)
    with pytest.raises(ArtifactError, match="made from another references"):
        main([*words, str(run), "--references", str(tmp_path / "references")])


@pytest.mark.parametrize(("words", "said"), [
    (["--sample", "3"], "checkpoint: missing"), (["--sample", "3", "--checkpoint", "run"], "references: missing"),
    (["--sample", "-1"], "sample=-1"), (["--sample", "3", "--tolerance", "nan"], "tolerance=nan"),
    (["--all"], "all: every checksum"), (["--tolerance", "0.1"], "add --sample"),
    (["--checkpoint", "run"], "add --sample"),
])
def test_a_wrong_option_is_named(words, said):
    from launch.verify_bank import main

    with pytest.raises(ConfigError, match=said):
        main(["--bank", "bank", *words])


def test_the_draw_is_uniform_and_of_distinct_ids():
    from megatron_m3.memory.verify import draw_sample

    counts = collections.Counter(int(id) for seed in range(2000) for id in draw_sample(5, 20, seed))
    expected = 2000 * 5 / 20
    assert sum((counts[id] - expected) ** 2 / expected for id in range(20)) < 44  # chi-squared, 19 degrees, p = 0.001
    assert draw_sample(30, 20, 0).tolist() == list(range(20))
    assert len(set(draw_sample(1000, 10**12, 0).tolist())) == 1000
    assert torch.equal(*(torch.from_numpy(draw_sample(9, 50, 3)) for _ in range(2)))
    assert draw_sample(9, 50, 3).tolist() != draw_sample(9, 50, 4).tolist()
