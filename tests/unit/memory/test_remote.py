"""A bank on a web server, with and without a local folder for its records: the same bytes, and every bad answer."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from megatron_m3.errors import ArtifactError, ConfigError
from tests.range_server import serve
from tests.unit.memory.test_bank import build, open_bank  # noqa: F401

IDS = [399, 0, 64, 63, 128, 64]


@pytest.fixture(scope="module")
def bank(folder, build):  # noqa: F811
    return open_bank(build(folder / "banks" / "bank", codec="KLT6"))


@pytest.fixture
def server(bank):
    with serve(bank.folder.parent) as server:
        yield server


def test_records_come_by_range(bank, server):
    remote = open_bank(f"{server.address}/bank/", weights_hash=bank.manifest.inputs["checkpoint"])
    assert (remote.hash, len(remote)) == (bank.hash, len(bank))
    server.asked.clear()
    for heads in (slice(None), slice(1, 2)):
        for name, value in vars(bank.read(IDS, kv_heads=heads)).items():
            assert torch.equal(value, getattr(remote.read(IDS, kv_heads=heads), name)), name
    assert np.array_equal(remote.records(range(400)), bank.records(range(400)))
    assert all(name.endswith(".bin") and sent.startswith("bytes=") for name, sent in server.asked)
    assert server.asked[0][1] != ""


def test_neighbours_come_in_one_answer_and_connections_stay(bank, server):
    remote = open_bank(f"{server.address}/bank")
    server.asked.clear()
    remote.reader.storage.threads = 2
    remote.records(range(64))
    assert len(server.asked) == 2
    for id in range(20):
        remote.records([id])
    assert len(server.asked) == 22
    assert server.connections <= 4


@pytest.mark.parametrize(("fault", "said"), [
    ("whole", "the server ignores Range"),
    ("short", "shorter than the .* bytes asked for"),
    ("other range", "asked for, the server sends bytes"),
    ("redirect", "302 Found: moved to http://elsewhere/bank; give the bank's address there"),
    ("forbidden", "403 Forbidden: the server does not let it be read"),
    ("missing", "404 Not Found: not there"),
    ("broken", "500 Internal Server Error; try again later"),
])
def test_a_bad_answer_is_refused_in_one_line(server, fault, said):
    remote = open_bank(f"{server.address}/bank")
    server.fault = fault
    with pytest.raises(ArtifactError, match=said) as error:
        remote.read([3])
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{server.address}/bank/shard_000000.bin: ")
    server.fault = ""
    assert len(remote.read([3])) == 1


def test_a_closed_connection_is_opened_again(bank, server):
    remote = open_bank(f"{server.address}/bank")
    server.fault = "hang up once"
    assert torch.equal(remote.read([3]).kv, bank.read([3]).kv)


def test_a_damaged_or_cut_record_is_refused(bank, tmp_path):
    shutil.copytree(bank.folder, tmp_path / "bank")
    path = tmp_path / "bank/shard_000001.bin"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data[:-1])
    with serve(tmp_path) as server:
        remote = open_bank(f"{server.address}/bank")
        remote.keep_in(tmp_path / "kept")
        with pytest.raises(ArtifactError, match=r"/bank/shard_000001.bin: the record of reference 64 is damaged"):
            remote.read([64])
        with pytest.raises(ArtifactError, match=r"shard_000001.bin: 416 .*: cut short; upload the bank again"):
            remote.read([127])
        assert len(remote.read([65])) == 1


def test_addresses_that_hold_no_bank(bank, server):
    for address, said in (
        (f"{server.address}/none", "/none/manifest.json: 404 Not Found: not there"),
        ("http://", "not the address of a folder"),
        ("http://127.0.0.1:99999/bank", "not the address of a folder"),
        ("http://127.0.0.1:1/bank", "refused; is the server there"),
        ("http://[::1", "not the address of a folder"),
        (f"http://{'a' * 64}.de/bank", "not the address of a folder"),
        (f"{server.address}/ä b%20c", "404 Not Found: not there"),
    ):
        with pytest.raises(ArtifactError, match=said):
            open_bank(address)
    assert server.asked[-1][0] == "/%C3%A4%20b%20c/manifest.json"
    with pytest.raises(ArtifactError, match=rf"^{server.address}/bank: this bank was made from another checkpoint"):
        open_bank(f"{server.address}/bank", weights_hash="0" * 64)
    with pytest.raises(ArtifactError, match="checksums of whole files are compared where the bank lies"):
        open_bank(f"{server.address}/bank", check=True)


def test_inspect_takes_an_address(bank, server, capsys):
    from launch.inspect_bank import main

    main(["--bank", f"{server.address}/bank"])
    assert "num_references      400" in capsys.readouterr().out


def test_kept_records_are_asked_for_once_and_become_the_banks_files(bank, server, tmp_path):
    def opened():
        remote = open_bank(f"{server.address}/bank")
        remote.keep_in(tmp_path / "kept")
        server.asked.clear()
        return remote

    remote = opened()
    first = remote.records(IDS)
    assert np.array_equal(first, bank.records(IDS))
    assert server.asked
    again = opened()
    assert np.array_equal(again.records(IDS), first)
    assert not server.asked
    assert again.read(IDS, kv_heads=slice(0, 1)).kv.shape[3] == 1
    assert not server.asked
    again.records(range(400))
    for path in bank.folder.glob("*.bin"):
        assert (tmp_path / "kept" / bank.hash / path.name).read_bytes() == path.read_bytes()


def test_a_damaged_kept_record_is_fetched_again(bank, server, tmp_path):
    remote = open_bank(f"{server.address}/bank")
    remote.keep_in(tmp_path)
    remote.records([3, 4])
    path = tmp_path / bank.hash / "shard_000000.bin"
    data = bytearray(path.read_bytes())
    data[4 * bank.record_bytes + 7] ^= 1
    path.write_bytes(data)
    server.asked.clear()
    assert np.array_equal(remote.records([3, 4]), bank.records([3, 4]))
    size = bank.record_bytes
    assert server.asked == [("/bank/shard_000000.bin", f"bytes={4 * size}-{5 * size - 1}")]
    assert path.read_bytes()[3 * size : 5 * size] == (bank.folder / path.name).read_bytes()[3 * size : 5 * size]


def test_ranks_share_a_folder_each_with_its_heads(bank, server, tmp_path):
    for heads in (slice(0, 1), slice(1, 2)):
        remote = open_bank(f"{server.address}/bank")
        remote.keep_in(tmp_path)
        assert torch.equal(remote.read(IDS, kv_heads=heads).kv, bank.read(IDS, kv_heads=heads).kv)
    server.asked.clear()
    assert np.array_equal(remote.records(IDS), bank.records(IDS))
    assert not server.asked


def test_the_folder_keeps_within_its_budget(bank, server, tmp_path):
    remote = open_bank(f"{server.address}/bank")
    budget = 12 * 4096
    remote.keep_in(tmp_path, budget)
    for id in range(0, 400, 7):
        assert np.array_equal(remote.records([id]), bank.records([id]))
        assert sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*.bin")) <= budget
    newest = sorted(path.name for path in tmp_path.rglob("*.bin"))
    assert "shard_000006.bin" in newest
    assert len(newest) < 7
    none = open_bank(f"{server.address}/bank")
    none.keep_in(tmp_path / "none", 0)
    none.records([1])
    assert not list((tmp_path / "none").rglob("*.bin"))


def test_what_is_not_the_folders_own_is_never_removed(bank, server, tmp_path):
    others = [tmp_path / "model.bin", tmp_path / "bank" / "shard_000000.bin"]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(50 * 4096))
    remote = open_bank(f"{server.address}/bank")
    remote.keep_in(tmp_path, 12 * 4096)
    for id in (0, 399):
        remote.records([id])
    assert all(path.exists() for path in others)
    assert list(tmp_path.glob(f"{bank.hash}/*.bin"))


def test_a_full_disk_keeps_nobody_from_reading(bank, server, tmp_path, monkeypatch):
    remote = open_bank(f"{server.address}/bank")
    remote.keep_in(tmp_path)
    remote.records([399])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    again = open_bank(f"{server.address}/bank")
    again.keep_in(tmp_path)
    assert np.array_equal(again.records(IDS), bank.records(IDS))
    assert not list(tmp_path.rglob("shard_000000.bin"))


def test_several_readers_use_one_folder_at_the_same_time(bank, server, tmp_path):
    whole = bank.records(range(400))

    def read(seed):
        remote = open_bank(f"{server.address}/bank")
        remote.keep_in(tmp_path, 16 * 4096)
        random = np.random.default_rng(seed)
        for _ in range(12):
            ids = random.integers(400, size=5)
            assert np.array_equal(remote.records(ids), whole[ids])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(read, range(3)))


def test_a_folder_that_cannot_be_written_is_refused(bank, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file: .*; give another folder for records"):
        open_bank(bank.folder).keep_in(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]
