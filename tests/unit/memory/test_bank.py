"""The bank on disk: its layout byte for byte, reading, and everything that must be refused."""

import dataclasses
import zlib

import numpy as np
import pytest
import torch

from megatron_m3.errors import ArtifactError, ConfigError, DataError, M3Error
from megatron_m3.manifest import read_manifest, write_manifest


@pytest.fixture(scope="module")
def build(folder, loaded, references):
    """Build a bank in this process: build(name, **options) -> folder."""
    from mpi4py import MPI

    from megatron_m3.config.bank import BankConfig
    from megatron_m3.memory.build import build_bank

    def build(output, **options):
        config = BankConfig(checkpoint="run", references=str(references.folder), output=str(output),
                            **{"block_size": 64} | options)
        build_bank(config, MPI.COMM_SELF, lambda path: loaded)
        return output

    return build


@pytest.fixture(scope="module")
def raw(folder, build):
    return build(folder / "raw", codec="none")


@pytest.fixture
def copy(raw, tmp_path):
    """A copy to be damaged."""
    import shutil

    shutil.copytree(raw, tmp_path / "bank")
    return tmp_path / "bank"


def open_bank(folder, **options):
    from megatron_m3.memory import MemoryBank

    return MemoryBank.open(folder, **options)


def test_the_layout_is_as_documented(raw, memories, references):
    L, G, K, D = 2, 2, 4, 16
    codes, places = G * L * 2 * K * D * 4, G * L * K * 2
    bank, id = open_bank(raw), 70
    assert bank.record_bytes == codes + places + 4 + 4 * G
    with (raw / "shard_000001.bin").open("rb") as stream:
        stream.seek((id - 64) * bank.record_bytes)
        record = stream.read(bank.record_bytes)
    stored = np.frombuffer(record[:codes], "<f4").reshape(G, L, 2, K, D)
    assert np.array_equal(stored, memories.kv[id].permute(2, 0, 1, 3, 4).numpy())
    placed = np.frombuffer(record[codes : codes + places], "<i2").reshape(G, L, K)
    assert np.array_equal(placed, memories.positions[id].permute(1, 0, 2).numpy())
    num_kept = record[codes + places : codes + places + 4]
    assert int.from_bytes(num_kept, "little") == memories.num_kept[id]
    sums = np.frombuffer(record[-4 * G :], "<u4")
    for head in range(G):
        part = stored[head].tobytes() + placed[head].tobytes() + num_kept
        assert sums[head] == zlib.crc32(part)
    last = len(references) % 64
    assert (raw / "shard_000006.bin").stat().st_size == last * bank.record_bytes


@pytest.mark.parametrize("ids", [[3], [399, 0, 64, 63, 128], [5, 5, 7, 5], []])
def test_any_ids_in_any_order(raw, memories, ids):
    read = open_bank(raw).read(ids)
    torch.testing.assert_close(read.kv, memories.kv[ids], rtol=1e-5, atol=1e-5)
    assert torch.equal(read.positions, memories.positions[ids])
    assert torch.equal(read.num_kept, memories.num_kept[ids])


@pytest.mark.parametrize("heads", [slice(0, 1), slice(1, 2), slice(0, 2), slice(1, 1)])
def test_a_rank_reads_its_heads_alone(raw, heads):
    bank, ids = open_bank(raw), [9, 300, 2]
    whole, part = bank.read(ids), bank.read(ids, kv_heads=heads)
    assert torch.equal(part.kv, whole.kv[:, :, :, heads])
    assert torch.equal(part.positions, whole.positions[:, :, heads])


def test_a_rank_decodes_its_heads_by_their_own_transforms(build, memories, tmp_path):
    bank, ids = open_bank(build(tmp_path / "bank", codec="KLT6")), [9, 300, 2]
    assert bank.settings.token_bytes == 6
    whole = bank.read(ids)
    assert torch.equal(bank.read(ids, kv_heads=slice(1, 2)).kv, whole.kv[:, :, :, 1:])
    assert torch.equal(bank.codec.round_trip(memories[ids]).kv, whole.kv)
    assert max(bank.codec.errors(memories)) < 0.2


@pytest.mark.parametrize("wrong", [400, -1, 10**12])
def test_an_id_out_of_range_is_refused(raw, wrong):
    with pytest.raises(DataError, match=f"reference {wrong} is not in 0-399"):
        open_bank(raw).read([3, wrong])


def test_another_model_or_tokenizer_is_refused(raw, loaded):
    open_bank(raw, weights_hash=loaded.weights_hash, tokenizer_hash=loaded.tokenizer.hash)
    with pytest.raises(ArtifactError, match="made from another checkpoint"):
        open_bank(raw, weights_hash="0" * 64)
    with pytest.raises(ArtifactError, match="made from another tokenizer"):
        open_bank(raw, tokenizer_hash="0" * 64)


def test_a_truncated_or_missing_shard_is_refused(copy):
    path = copy / "shard_000002.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=r"shard_000002.bin: .* bytes, the manifest says"):
        open_bank(copy)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"shard_000002.bin: missing"):
        open_bank(copy)


def test_a_shard_cut_short_after_opening_is_refused(copy):
    bank = open_bank(copy)
    path = copy / "shard_000002.bin"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"shard_000002.bin: cut short"):
        bank.read([130])


def test_a_flipped_bit_anywhere_is_found_on_reading_and_by_verify(copy, capsys):
    from launch.verify_bank import main

    path, id = copy / "shard_000001.bin", 77
    data, size = bytearray(path.read_bytes()), open_bank(copy).record_bytes
    main(["--bank", str(copy)])
    assert "whole; 400 memories in 7 shards" in capsys.readouterr().out
    for place in (0, size // 2, size - 50, size - 10, size - 1):
        damaged = bytearray(data)
        damaged[(id - 64) * size + place] ^= 16
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"shard_000001.bin: the record of reference 77 is damaged"):
            open_bank(copy).read([76, 77])
        assert len(open_bank(copy).read([76, 78])) == 2
        with pytest.raises(ArtifactError, match=r"shard_000001.bin: checksum differs"):
            main(["--bank", str(copy)])


def test_another_codec_in_the_folder_is_refused(copy, build, tmp_path):
    import shutil

    other = build(tmp_path / "other", codec="SQ8")
    shutil.rmtree(copy / "codec")
    shutil.copytree(other / "codec", copy / "codec")
    with pytest.raises(ArtifactError, match="made from another codec"):
        open_bank(copy)


def test_an_unfinished_bank_is_refused(copy):
    (copy / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="unfinished"):
        open_bank(copy)


def test_a_bank_of_another_version_is_refused(copy):
    manifest = read_manifest(copy, "bank", 2)
    write_manifest(copy, dataclasses.replace(manifest, schema=3))
    with pytest.raises(ArtifactError, match="bank schema 3, this version reads 2"):
        open_bank(copy)


def test_reading_writes_nothing(raw):
    before = {path: path.stat().st_mtime_ns for path in raw.rglob("*")}
    open_bank(raw).read(range(400))
    assert {path: path.stat().st_mtime_ns for path in raw.rglob("*")} == before


def test_the_bank_tells_the_memory_settings(raw, loaded, build, tmp_path):
    config = open_bank(build(tmp_path / "bank", codec="SQ8", memory_layers="1-3", memory_tokens="all")).configure(
        loaded.config
    )
    assert config.memory_layers == (1, 2, 3)
    assert config.memory.num_kept_tokens == 16
    other = dataclasses.replace(loaded.config, memory=dataclasses.replace(loaded.config.memory, prefix="Text:"))
    with pytest.raises(ConfigError, match=r"memory.prefix=Text:: the bank .* was written with Reference:"):
        open_bank(raw).configure(other)


def test_a_diverged_model_writes_no_bank(tmp_path, loaded, references):
    from mpi4py import MPI

    from megatron_m3.config.bank import BankConfig
    from megatron_m3.memory.build import build_bank

    weight = loaded.model.decoder.layers[0].self_attention.linear_qkv.weight
    healthy = weight.detach().clone()
    options = BankConfig(checkpoint="run", references=str(references.folder), output=str(tmp_path / "bank"))
    try:
        weight.data[0] = float("inf")
        with pytest.raises(M3Error, match="not finite"):
            build_bank(options, MPI.COMM_SELF, lambda path: loaded)
    finally:
        weight.data.copy_(healthy)
    assert not list((tmp_path / "bank").glob("shard_*"))


def test_inspect_marks_what_was_kept(raw, folder, references, memories, capsys):
    from launch.inspect_bank import main

    main(["--bank", str(raw), "--reference", "5", "--references", str(references.folder), "--tokenizer",
          str(folder / "tokenizer")])
    lines = capsys.readouterr().out.splitlines()
    assert references.text(5) in lines
    shown = [line for line in lines if line.startswith("layer ")]
    names = [f"layer {layer} head {head}" for layer in (0, 2) for head in (0, 1)]
    assert [line.split("  ")[0] for line in shown] == names
    assert all(line.count("[") == int(memories.num_kept[5]) for line in shown)
    main(["--bank", str(raw)])
    assert "num_references      400" in capsys.readouterr().out
    with pytest.raises(DataError, match=f"reference {1 << 70} is not in 0-399"):
        main(["--bank", str(raw), "--reference", str(1 << 70), "--references", str(references.folder), "--tokenizer",
              str(folder / "tokenizer")])
