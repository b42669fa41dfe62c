"""What a build says it will take is what it takes, and it does not begin where the disk is too small."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from megatron_m3.config import replace_fields
from megatron_m3.config.bank import BankConfig
from megatron_m3.errors import ConfigError, M3Error

CODECS = ("none", "auto", "RQ4x5", "KLT6")


@pytest.fixture(scope="module")
def order(folder, loaded, references):
    """The order of a bank: order(name, **options)."""
    from megatron_m3.memory.bank_order import BankOrder

    def order(name, **options):
        given = {"block_size": 64, "codec_sample": 300} | options
        config = BankConfig(checkpoint="run", references=str(references.folder), output=str(folder / name), **given)
        return BankOrder.open(config, lambda path: loaded)

    return order


@pytest.fixture(scope="module")
def build(loaded):
    """Build what was ordered, in this process."""
    from mpi4py import MPI

    from megatron_m3.memory.build import build_bank

    def build(order):
        build_bank(order.options, MPI.COMM_SELF, lambda path: loaded)
        return order.folder

    return build


def measure(order):
    from megatron_m3.memory.space import measure_space

    return measure_space(order.planned_settings(), order.key, order.folder)


def size(folder, pattern):
    return sum(path.stat().st_size for path in folder.glob(pattern))


@pytest.mark.parametrize("codec", CODECS)
def test_the_bank_takes_what_was_said(order, build, codec):
    from megatron_m3.memory import MemoryBank

    ordered = order(f"said_{codec}", codec=codec)
    said = measure(ordered)
    assert not ordered.folder.exists()
    bank = build(ordered)
    assert said.settings == MemoryBank.open(bank).settings
    assert said.shard_bytes == size(bank, "shard_*.bin")
    assert said.missing == list(range(7))
    written = size(bank, "*.json")
    assert said.manifest_bytes == pytest.approx(written, rel=0.05)
    trained = size(bank, "codec/*") - size(bank, "codec/manifest.json")
    assert said.codec_bytes == pytest.approx(trained, rel=0.2, abs=1000)
    assert said.missing_bytes == said.shard_bytes + said.manifest_bytes + said.codec_bytes


def test_what_is_there_is_not_counted_again(order, build):
    ordered = order("there")
    bank = build(ordered)
    assert measure(ordered).missing_bytes == 0
    (bank / "shard_000002.bin").unlink()
    (bank / "shard_000006.bin").write_bytes(b"cut short")
    space = measure(ordered)
    assert space.missing == [2, 6]
    records = (64 + 400 % 64) * space.settings.record.record_bytes
    assert records < space.missing_bytes < records + 2 * 200, "and the two shards' records"


def test_too_small_a_disk_is_refused_and_nothing_written(order, build, monkeypatch):
    ordered = order("full")
    needed = measure(ordered).missing_bytes

    def leave(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))

    leave(needed - 1)
    with pytest.raises(M3Error, match=f"full: no disk space: {needed:,} bytes are still to be written, {needed - 1:,} "
                                      "are free; free 1 more or choose another folder"):
        build(ordered)
    assert not ordered.folder.exists()
    leave(needed)
    bank = build(ordered)
    leave(0)
    build(ordered)
    (bank / "shard_000001.bin").unlink()
    names = sorted(path.name for path in bank.iterdir())
    with pytest.raises(M3Error, match=r"[\d,]+ bytes are still to be written, 0 are free"):
        build(ordered)
    assert sorted(path.name for path in bank.iterdir()) == names
    (bank / ".shard_000001.bin.1.tmp").write_bytes(bytes(needed))
    build(ordered)
    assert (bank / "shard_000001.bin").exists()


def test_a_folder_of_another_job_is_named_before_its_disk(order, build, monkeypatch):
    build(order("other"))
    with pytest.raises(M3Error, match="made from other inputs or settings"):
        measure(order("other", block_size=32))


def test_flops_are_the_cost_models_for_each_length(order, references, loaded):
    from megatron_m3.evaluation.bank_plan import plan_build
    from megatron_m3.evaluation.cost import knowledge_cost

    plan = plan_build(order("flops", plan_tflops=2.0), [2.0, 1.0])
    lengths = references.tokens(range(400))[1]
    assert len(np.unique(lengths)) > 1

    def cost(length):
        memory = replace(loaded.config.memory, reference_length=int(length))
        return knowledge_cost(replace(loaded.config, memory=memory)).write_memory

    assert plan.write_flops == pytest.approx(sum(map(cost, lengths)))
    assert 0 < plan.sample_flops < plan.write_flops
    assert plan.model_seconds == pytest.approx((plan.write_flops + plan.sample_flops) / 3e12 / 0.5)
    assert plan.vectors == 2 * 4 * np.minimum(lengths, 4).sum()


def test_the_codecs_time_and_the_ram_are_in_the_plan(order, references):
    from megatron_m3.evaluation.bank_plan import plan_build

    plan = plan_build(order("codec_time", plan_tflops=1.0), [1.0, 1.0])
    assert plan.vectors_per_second > 1000
    assert plan.coding_seconds == pytest.approx(plan.vectors / plan.vectors_per_second / 2)
    assert plan.seconds == pytest.approx(plan.training_seconds + plan.model_seconds + plan.coding_seconds)
    assert plan.training_seconds > 0
    assert plan.first_rank_bytes >= plan.rank_bytes > plan.model_bytes + plan.open_shard_bytes + 3 * plan.group_bytes


def test_large_codebooks_take_as_much_longer_as_they_are_larger(order):
    from megatron_m3.evaluation.codec_time import measure_codec

    settings = measure(order("large", codec="PQ4x6")).settings
    small, large = (measure_codec(replace(settings, codec=name), 10**5) for name in ("PQ4x8", "PQ4x12"))
    assert (small.is_scaled, large.is_scaled) == (False, True)
    assert 8 < small.vectors_per_second / large.vectors_per_second < 32
    assert large.training_seconds > 8 * small.training_seconds


def test_a_plan_counts_only_what_is_missing(order, build):
    from megatron_m3.evaluation.bank_plan import plan_build, plan_table

    whole = plan_build(order("part"), [1.0])
    bank = build(order("part"))
    (bank / "shard_000000.bin").unlink()
    part = plan_build(order("part"), [1.0])
    assert part.missing_references == 64
    assert part.sample_flops == part.sample_references == 0
    assert 0.1 < part.write_flops / whole.write_flops < 0.25
    assert "still missing: 1, with 64 references" in plan_table(part)
    assert "TOO LITTLE" in plan_table(replace(part, free_bytes=part.missing_bytes - 1))
    assert "TOO LITTLE" not in plan_table(replace(part, free_bytes=part.missing_bytes))


def test_a_sample_too_small_for_the_codec_is_said_first(order):
    with pytest.raises(ConfigError, match=r"needs 638,976 keys to train on, the sample of 300 references has"):
        measure(order("small", codec="Residual2x14,PQ8x10"))


@pytest.mark.parametrize(("option", "said"), [
    ("plan_utilisation=0", "above 0 and at most 1"), ("plan_tflops=-1", "0 or more"), ("json=true", "add --plan"),
])
def test_a_wrong_plan_option_is_named(option, said):
    with pytest.raises(ConfigError, match=said):
        replace_fields(BankConfig(checkpoint="a", references="b", output="c"), dict([option.split("=")]))


def test_the_command_needs_no_weights(folder, loaded, references, capsys):
    from launch.build_bank import main
    from megatron_m3.model.checkpoint import save_checkpoint

    data = replace(loaded.config.data, tokenizer=str(folder / "tokenizer"))
    run = save_checkpoint(folder / "run", 1, [loaded.model], replace(loaded.config, data=data))
    for path in run.glob("*.distcp"):
        path.write_bytes(bytes(path.stat().st_size))
    words = ["--checkpoint", str(folder / "run"), "--references", str(references.folder), "--output",
             str(folder / "planned"), "--plan"]
    main(words)
    text = capsys.readouterr().out
    assert "400 references of" in text
    assert "measured here" in text
    main([*words, "--json", "--plan-tflops", "5"])
    plan = json.loads(capsys.readouterr().out)
    assert (plan["references"], plan["ranks"], plan["tflops"]) == (400, 1, 5.0)
    assert not (folder / "planned").exists()
