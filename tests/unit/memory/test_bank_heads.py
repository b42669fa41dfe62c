"""A bank of a model with memory heads: records, reading by ranks and codecs of the lists that there are alone."""

import dataclasses
import json
import shutil
import zlib

import numpy as np
import pytest
import torch

from megatron_m3.config import replace_fields
from megatron_m3.errors import ArtifactError, ConfigError
from tests.unit.memory.test_bank import build, open_bank, raw  # noqa: F401

CODECS = {"none": 128, "PQ8x4": 8, "KLT6": 6}
"""Bytes of a key and value of 16 numbers each."""
HEADS = "0:1;2:0,1"
IDS = [9, 300, 2, 9]


@pytest.fixture(scope="module")
def banks(folder, build):  # noqa: F811
    """One of each codec."""
    return {codec: open_bank(build(folder / f"heads_{codec}", codec=codec, memory_heads=HEADS)) for codec in CODECS}


@pytest.mark.parametrize("codec", CODECS)
def test_the_record_holds_the_lists_of_memory_heads_alone(banks, memories, codec):
    bank, K, G = banks[codec], 4, 2
    codes, places = 3 * K * CODECS[codec], 3 * K * 2
    assert bank.record_bytes == codes + places + 4 + 4 * G
    record = (bank.folder / "shard_000001.bin").read_bytes()[6 * bank.record_bytes : 7 * bank.record_bytes]
    # by head, then by layer: head 0 in layer 2; head 1 in layers 0 and 2
    placed = np.frombuffer(record[codes : codes + places], "<i2").reshape(3, K)
    lists = [(1, 0), (0, 1), (1, 1)]
    for place, (layer, head) in enumerate(lists):
        assert placed[place].tolist() == memories.positions[70, layer, head].tolist()
        if codec == "none":
            stored = np.frombuffer(record[:codes], "<f4").reshape(3, 2, K, 16)[place]
            assert np.array_equal(stored, memories.kv[70, layer, :, head].numpy())
    sums = np.frombuffer(record[-4 * G :], "<u4")
    num_kept = record[codes + places : codes + places + 4]
    for head, (first, last) in enumerate([(0, 1), (1, 3)]):
        part = record[first * codes // 3 : last * codes // 3] + placed[first:last].tobytes() + num_kept
        assert sums[head] == zlib.crc32(part)


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_read_is_what_the_model_writes(banks, memories, codec):
    bank, held_LG = banks[codec], torch.tensor([[False, True], [True, True]])
    read, written = bank.read(IDS), memories[IDS]
    assert torch.equal(read.kv, bank.codec.round_trip(written).kv)
    assert torch.equal(read.positions, written.positions * held_LG[..., None])
    assert torch.equal(read.num_kept, written.num_kept)
    assert not read.kv[:, 0, :, 0].any()
    lists, exact = (some.kv.transpose(2, 3)[:, held_LG] for some in (read, written))
    assert (lists - exact).square().sum() <= {"none": 1e-9, "PQ8x4": 0.2, "KLT6": 0.2}[codec] * exact.square().sum()
    for heads in (slice(0, 1), slice(1, 2), slice(1, 1)):
        part = bank.read(IDS, kv_heads=heads)
        assert torch.equal(part.kv, read.kv[:, :, :, heads])
        assert torch.equal(part.positions, read.positions[:, :, heads])


@pytest.mark.parametrize("codec", CODECS)
def test_a_rank_without_a_memory_head_reads_nothing(build, memories, tmp_path, codec):  # noqa: F811
    bank = open_bank(build(tmp_path / "bank", codec=codec, memory_heads="0:1;2:1"))
    part = bank.read(IDS, kv_heads=slice(0, 1))
    assert part.kv.shape == (4, 2, 2, 1, 4, 16)
    assert not part.kv.any()
    assert torch.equal(part.num_kept, memories.num_kept[IDS])
    assert torch.equal(bank.read(IDS, kv_heads=slice(1, 2)).kv, bank.read(IDS).kv[:, :, :, 1:])


def test_damage_is_seen_by_the_rank_that_reads_it(banks, tmp_path):
    shutil.copytree(banks["KLT6"].folder, tmp_path / "bank")
    bank, path = open_bank(tmp_path / "bank"), tmp_path / "bank" / "shard_000001.bin"
    data = bytearray(path.read_bytes())
    data[13 * bank.record_bytes + bank.record.codes(slice(1, 2)).start] ^= 1
    path.write_bytes(data)
    assert len(bank.read([77], kv_heads=slice(0, 1))) == 1
    for heads in (slice(1, 2), slice(0, 2)):
        with pytest.raises(ArtifactError, match="the record of reference 77 is damaged"):
            bank.read([77], kv_heads=heads)


@pytest.mark.parametrize("codec", ["PQ8x4", "KLT6"])
def test_codecs_learn_from_memory_heads_alone(banks, memories, loaded, references, codec):
    from megatron_m3.memory import measure_sensitivity, train_codec

    held_LG = banks[codec].settings.memory_lists
    kv = memories.kv.clone()
    kv[:, 0, :, 0] = 1e4
    tokens, lengths = references.tokens(range(40))
    rows = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    sensitivity = measure_sensitivity(loaded, rows)
    files = [train_codec(codec, dataclasses.replace(memories, kv=some), held_LG=held_LG,
                         sensitivity=lambda: sensitivity).files() for some in (memories.kv, kv)]
    assert files[0] == files[1]
    assert max(banks[codec].codec.errors(memories)) == max(
        banks[codec].codec.errors(dataclasses.replace(memories, kv=kv)))


def test_a_bank_says_its_memory_heads(banks, raw, loaded, capsys, tmp_path, references, folder):  # noqa: F811
    from launch.inspect_bank import main as inspect
    from launch.verify_bank import main as verify

    bank = banks["KLT6"]
    assert bank.configure(loaded.config).memory_heads == {0: (1,), 2: (0, 1)}
    other = replace_fields(loaded.config, {"memory.heads": HEADS})
    assert open_bank(raw).configure(other).memory.heads == "all"
    verify(["--bank", str(bank.folder)])
    assert "whole; 400 memories" in capsys.readouterr().out
    inspect(["--bank", str(bank.folder), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["memory_heads"], facts["record_bytes"]) == (HEADS, bank.record_bytes)
    inspect(["--bank", str(bank.folder), "--reference", "5", "--references", str(references.folder), "--tokenizer",
             str(folder / "tokenizer")])
    shown = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("layer ")]
    assert shown == ["layer 0 head 1", "layer 2 head 0", "layer 2 head 1"]


def test_all_heads_by_name_are_all_heads(build, raw, tmp_path):  # noqa: F811
    named = build(tmp_path / "bank", codec="none", memory_heads="2:1,0; 0:0,1")
    assert {path.name: path.read_bytes() for path in named.glob("*.*")} == {
        path.name: path.read_bytes() for path in raw.glob("*.*")}
    assert "heads" not in (raw / "manifest.json").read_text().replace("num_kv_heads", "")
    assert "heads" not in (raw / "job.json").read_text()


def test_a_checkpoints_own_memory_heads_are_taken(loaded, references, banks, tmp_path):
    from mpi4py import MPI

    from megatron_m3.config.bank import BankConfig
    from megatron_m3.memory.build import build_bank

    def load(path):
        return dataclasses.replace(loaded, config=replace_fields(loaded.config, {"memory.heads": "2:1,0;0:1"}))

    options = {"checkpoint": "run", "references": str(references.folder), "block_size": 64}
    output = BankConfig(**options, output=str(tmp_path / "bank"), codec="none")
    build_bank(output, MPI.COMM_SELF, load)
    assert open_bank(tmp_path / "bank").hash == banks["none"].hash
    with pytest.raises(ConfigError, match=r"memory.heads=2:1,0;0:1: must name each memory layer once"):
        build_bank(dataclasses.replace(output, memory_layers="1"), MPI.COMM_SELF, load)
    with pytest.raises(ArtifactError, match="bank: holds blocks made from other inputs or settings"):
        build_bank(dataclasses.replace(output, memory_heads="0:0;2:0,1"), MPI.COMM_SELF, load)
