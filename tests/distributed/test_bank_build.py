"""The bank build with real MPI processes: any number of ranks gives the same bytes, and mistakes are named."""

import json
import subprocess

import numpy as np
import pytest

from megatron_m3.errors import ArtifactError, M3Error
from tests.bank_jobs import JOB, NUM_REFERENCES, build, build_here, command, digest
from tests.knowledge import build_knowledge
from tests.launcher import run_command
from tests.tiny_model import joined_world


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_bytes(inputs, built, tmp_path, ranks):
    done = build(inputs, tmp_path / "bank", ranks, *JOB)
    assert digest(tmp_path / "bank") == digest(built)
    assert done.stdout.count("memories of") == 1


def test_a_bank_of_memory_heads_too(inputs, tmp_path):
    job = ("block-size", "50", "codec", "KLT12", "codec-sample", "200", "memory-heads")
    build(inputs, tmp_path / "bank", 2, *job, "0:1;1:0,1")
    build_here(inputs, tmp_path / "alone", *job, "0:1;1:0,1")
    before = digest(tmp_path / "bank")
    assert before == digest(tmp_path / "alone")
    with pytest.raises(M3Error, match="made from other inputs or settings"):
        build_here(inputs, tmp_path / "bank", *job, "0:0;1:0,1")
    assert digest(tmp_path / "bank") == before


def test_a_bank_holds_what_the_model_writes(inputs, built):
    from megatron_m3.memory import MemoryBank, encode_references
    from megatron_m3.model.checkpoint import load_model
    from megatron_m3.references import ReferenceStore

    with joined_world():
        loaded = load_model(inputs / "run")
        bank = MemoryBank.open(built, weights_hash=loaded.weights_hash, tokenizer_hash=loaded.tokenizer.hash)
        ids = np.random.default_rng(0).permutation(NUM_REFERENCES)[:50]
        fresh = encode_references(loaded, *ReferenceStore.open(inputs / "references").tokens(ids))
    read = bank.read(ids)
    assert bank.codec_name == "KLT7"
    assert (read.positions == fresh.positions).all()
    assert (read.num_kept == fresh.num_kept).all()
    error = (read.kv - fresh.kv).square().sum() / fresh.kv.square().sum()
    assert 0 < error < 0.05


def test_a_removed_shard_is_written_again(inputs, built, tmp_path):
    output = tmp_path / "bank"
    subprocess.run(["cp", "-r", str(built), str(output)], check=True)
    (output / "shard_000003.bin").unlink()
    build_here(inputs, output, *JOB)
    assert digest(output) == digest(built)


def test_a_damaged_shard_is_written_again(inputs, built, tmp_path):
    from launch.verify_bank import main as verify

    output = tmp_path / "bank"
    subprocess.run(["cp", "-r", str(built), str(output)], check=True)
    path = output / "shard_000005.bin"
    data = bytearray(path.read_bytes())
    data[99] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"shard_000005.bin: checksum differs.*run `m3 bank build` into the folder"):
        verify(["--bank", str(output)])
    whole = {other: other.stat().st_mtime_ns for other in output.glob("shard_*.bin") if other != path}
    build_here(inputs, output, *JOB)
    assert digest(output) == digest(built)
    assert {other: other.stat().st_mtime_ns for other in whole} == whole
    verify(["--bank", str(output)])


def test_a_shard_with_other_last_bits_is_not_taken_for_the_one_that_was_there(inputs, built, tmp_path):
    from launch.verify_bank import main as verify
    from megatron_m3.memory.bank import ShardFolder

    output = tmp_path / "bank"
    subprocess.run(["cp", "-r", str(built), str(output)], check=True)
    job = json.loads((output / "job.json").read_text())["job"]
    shards = ShardFolder(output, job)
    shards.write_bytes(5, (output / "shard_000006.bin").read_bytes())  # as another machine would
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"such as shard_000005.bin, .*remove the manifest.json and give"):
            build_here(inputs, output, *JOB)
    (output / "manifest.json").unlink()
    build_here(inputs, output, *JOB)
    verify(["--bank", str(output)])


def test_shards_without_their_codec_are_refused(inputs, built, tmp_path):
    output = tmp_path / "bank"
    subprocess.run(["cp", "-r", str(built), str(output)], check=True)
    subprocess.run(["rm", "-r", str(output / "codec"), str(output / "manifest.json")], check=True)
    before = digest(output)
    with pytest.raises(ArtifactError, match="bank/codec: no codec, but shards that were written with it"):
        build_here(inputs, output, *JOB)
    assert digest(output) == before


def test_a_broken_record_is_named(inputs, built, tmp_path):
    output = tmp_path / "bank"
    subprocess.run(["cp", "-r", str(built), str(output)], check=True)
    record = output / "shard_000005.json"
    record.write_text("{")
    with pytest.raises(ArtifactError, match=r"shard_000005.json: damaged.*remove it and run the job again"):
        build_here(inputs, output, *JOB)
    record.unlink()
    build_here(inputs, output, *JOB)
    assert digest(output) == digest(built)


@pytest.mark.parametrize(("more", "said"), [
    (("codec", "PQ7x8"), "no standalone codec of it for head size 16"),
    (("codec", "nonsense"), "no standalone codec"),
    (("codec", ",,"), "no standalone codec"),
    (("block-size", "0"), "block_size=0: must be at least 1"),
    (("memory-layers", "3-9"), "memory.layers=3-9: the model has layers 0-3"),
    (("checkpoint", "/nowhere"), "/nowhere: no such folder"),
])
def test_a_mistake_is_named(inputs, tmp_path, more, said):
    with pytest.raises(M3Error) as error:
        build_here(inputs, tmp_path / "bank", *more)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize(("more", "said"), [
    (("codec", "Residual2x14,PQ8x10"), "needs 638,976 keys to train on, the sample of 600 references has"),
    (("output", "/proc/bank"), "/proc/bank"),
])
def test_a_mistake_is_one_line_and_status_2_on_all_ranks(inputs, tmp_path, more, said):
    done = build(inputs, tmp_path / "bank", 2, *more, expect=2)
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("bank/shard_*"))


def test_references_of_another_tokenizer_are_refused(inputs, tmp_path):
    from megatron_m3.tokenizer import train_tokenizer

    train_tokenizer(["another text altogether"] * 9, 300, tmp_path / "tokenizer")
    build_knowledge(tmp_path, tmp_path / "tokenizer", count=4, words=5, reference_length=16)
    with pytest.raises(ArtifactError, match="made with another tokenizer"):
        build_here(inputs, tmp_path / "bank", "references", str(tmp_path / "references"))
    assert not (tmp_path / "bank").exists()


def test_a_folder_of_another_job_is_refused_and_left_build_here(inputs, built):
    before = digest(built)
    with pytest.raises(ArtifactError, match="made from other inputs or settings"):
        build_here(inputs, built, "block-size", "32")
    assert digest(built) == before


def test_a_full_disk_stops_all_ranks(inputs, tmp_path):
    """The limit on file size stands for the full disk; the only shard has 9.9 MB."""
    job = command(inputs, tmp_path / "bank", 2, "codec", "none", "memory-layers", "all", "memory-tokens", "all")
    limited = ["bash", "-c", f"ulimit -f 8000; exec {' '.join(job)}"]
    done = run_command(limited, timeout=120, expect=2)
    assert "shard_" in done.stderr
    assert "free space" in done.stderr
    assert not list(tmp_path.glob("bank/*shard_*"))
    assert not (tmp_path / "bank" / "manifest.json").exists()


def test_a_disk_too_small_is_told_once_and_left_empty(inputs, tmp_path):
    """On a real disk of 64 KiB; skipped where a process may not mount one."""
    disk, small = tmp_path / "disk", ["unshare", "--map-root-user", "--mount", "bash", "-c"]
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=64k none {disk}"
    if subprocess.run([*small, mount], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk")
    job = " ".join(command(inputs, disk / "bank", 2, *JOB))
    done = run_command([*small, f"{mount}; {job}; status=$?; ls -A {disk}; exit $status"], timeout=120, expect=2)
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert "still to be written, 65,536 are free" in lines[0]
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
