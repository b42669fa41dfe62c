"""Cold start: what the model writes when asked is a bank's record, is kept on disk, and is what the warm bank holds."""

import numpy as np
import pytest
import torch

from megatron_m3.errors import ArtifactError
from tests.unit.memory.test_bank import build, open_bank  # noqa: F401


@pytest.fixture(scope="module")
def banks(folder, build):  # noqa: F811
    """With the default size of shards."""
    return {codec: open_bank(build(folder / f"cold_{codec}", codec=codec, block_size=4096))
            for codec in ("none", "KLT6")}


def cold(loaded, references, bank, folder):
    from megatron_m3.memory import ColdMemories

    codec = "" if bank.codec_name == "none" else str(bank.folder / "codec")
    memories = ColdMemories.open(loaded, references, codec)
    memories.keep_in(folder)
    return memories


@pytest.mark.parametrize("codec", ["none", "KLT6"])
def test_a_folder_of_written_records_becomes_the_bank(banks, loaded, references, tmp_path, monkeypatch, codec):
    bank = banks[codec]
    memories = cold(loaded, references, bank, tmp_path)
    # the groups that the build encodes together
    for first in range(0, 400, 128):
        ids = np.arange(first, min(first + 128, 400))
        assert np.array_equal(memories.rows(ids), bank.records(ids))
    (path,) = tmp_path.rglob("*.bin")
    assert path.read_bytes() == (bank.folder / "shard_000000.bin").read_bytes()

    def write(*unused):
        raise AssertionError("the next process writes nothing")

    monkeypatch.setattr("megatron_m3.memory.cold.start_encoding", write)
    again = cold(loaded, references, bank, tmp_path)
    ids = np.array([5, 70, 399])
    assert np.array_equal(again.rows(ids), bank.records(ids))
    assert np.array_equal(again.rows(ids, slice(1, 2)), bank.rows(ids, slice(1, 2)))
    with pytest.raises(AssertionError, match="writes nothing"):
        cold(loaded, references, bank, tmp_path / "other").rows(ids)


def test_single_memories_are_those_of_the_bank_but_for_last_bits(banks, loaded, references, tmp_path):
    from megatron_m3.memory import ColdSource

    source, bank = ColdSource(loaded, references), banks["none"]
    for ids in ([7], [300, 2]):
        found, expected = source.fetch(ids), bank.read(ids)
        torch.testing.assert_close(found.kv, expected.kv, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.positions, expected.positions)


def test_only_what_is_missing_is_written(banks, loaded, references, tmp_path, monkeypatch):
    asked = []
    memories = cold(loaded, references, banks["KLT6"], tmp_path)
    write = memories._write
    monkeypatch.setattr(memories, "_write", lambda ids: asked.append(ids.tolist()) or write(ids))
    memories.rows(np.array([3, 9]))
    (path,) = tmp_path.rglob("*.bin")
    data = bytearray(path.read_bytes())
    data[9 * memories.record.record_bytes] ^= 1
    path.write_bytes(data)
    memories.rows(np.array([3, 9, 12]))
    assert asked == [[3, 9], [9, 12]]


def test_codecs_of_another_model_or_other_layers_are_refused(banks, build, loaded, references, tmp_path):  # noqa: F811
    import dataclasses

    from megatron_m3.memory import ColdMemories

    folder = str(banks["KLT6"].folder / "codec")
    with pytest.raises(ArtifactError, match="made from another checkpoint"):
        ColdMemories.open(dataclasses.replace(loaded, weights_hash="0" * 64), references, folder)
    other = open_bank(build(tmp_path / "bank", codec="KLT6", memory_layers="1-3"))
    with pytest.raises(ArtifactError, match="trained for other memory layers or heads"):
        ColdMemories.open(loaded, references, str(other.folder / "codec"))
