"""Memories that are read again in later steps instead of encoding their references."""

import itertools

import numpy as np
import pytest
import torch

from megatron_m3.config import get_recipe, replace_fields
from megatron_m3.config.reuse import held_layers, memory_bytes, num_slots
from megatron_m3.errors import ConfigError
from megatron_m3.platform import select
from megatron_m3.platform.distributed import parallel_world
from tests.reused_batches import reused_batches

PREFIX, STEPS = [1, 7, 9], 4
BYTES = 2 * 4 * (2 * 2 * 16 * 4 + 1)
"""Of one memory of the tiny recipe in fp32, in its two memory layers."""


def tiny(**overrides):
    fields = {"training.stage": "continual", "model.init_std": "0.1", "training.global_batch": "4",
              "training.micro_batch": "1", "training.dtype": "fp32"}
    return replace_fields(get_recipe("tiny"), fields | {key.replace("__", "."): str(value)
                                                        for key, value in overrides.items()})


def train(rate, batches=None, **overrides):
    """What every step said, and the memories that are held after the last one."""
    torch.set_num_threads(1)
    select()
    from megatron_m3.training.schedule import gradient_in_references
    from megatron_m3.training.setup import build_machinery
    from megatron_m3.training.step import training_step

    config = tiny(**overrides)
    with parallel_world(config.parallel, 1) as platform:
        machinery, read = build_machinery(config, platform, PREFIX), batches or reused_batches(config, STEPS)
        return [training_step(machinery, read, rate, reference_gradient=gradient_in_references(step, config.training))
                for step in range(STEPS)], machinery.memories


def losses(steps):
    return [step.loss for step in steps]


def norms(steps):
    return [step.grad_norm for step in steps]


@pytest.mark.parametrize("overrides", [
    {}, {"parallel__recompute": "true"}, {"training__reference_gradient_every": 2}, {"memory__layers": "1,3"},
    {"training__reuse_bytes": 16 * BYTES, "parallel__recompute": "true"}, {"memory__heads": "0:1;1:0"},
    {"training__micro_batch": 2}])
def test_memories_of_weights_that_stay_are_as_good_as_new(overrides):
    plain, _ = train(0.0, **overrides)
    reused, _ = train(0.0, **{"training__reuse_memories": 100} | overrides)
    assert losses(reused) == pytest.approx(losses(plain), abs=1e-6)
    assert [step.encoded + step.reused for step in reused] == [step.encoded for step in plain]
    assert sum(step.reused for step in reused) > 5


def test_what_never_comes_again_trains_as_if_nothing_was_held():
    plain, _ = train(1e-3)
    different = (
        {name: tensor + 1000 * number * (tensor >= 0) if name == "reference_ids" else tensor
         for name, tensor in batch.items()}
        for number, batch in enumerate(reused_batches(tiny(), STEPS)))
    held, _ = train(1e-3, different, training__reuse_memories=100)
    assert held == plain
    assert not any(step.reused for step in held)


def test_weights_that_move_leave_memories_behind():
    plain, _ = train(1e-3)
    same_step, _ = train(1e-3, training__reuse_memories=1)
    reused, _ = train(1e-3, training__reuse_memories=2)
    assert losses(same_step)[0] == losses(plain)[0]
    assert same_step[0].reused == 0
    assert abs(losses(reused)[1] - losses(plain)[1]) > 1e-5


def test_within_a_step_only_the_gradient_changes():
    """Two micro-batches alike: the second one reads what the first one wrote."""
    batch = next(reused_batches(tiny(), 1))
    twice = {"training__global_batch": 2, "batches": itertools.repeat(batch)}
    plain, _ = train(1e-3, **twice)
    reused, _ = train(1e-3, training__reuse_memories=1, **twice)
    assert reused[0].loss == pytest.approx(plain[0].loss, abs=1e-6)
    assert reused[0].encoded == reused[0].reused == plain[0].encoded / 2
    assert abs(reused[0].grad_norm - plain[0].grad_norm) > 1e-4


@pytest.mark.parametrize("recompute", ["true", "false"])
def test_held_memories_are_constants(recompute):
    """A step that encodes nothing has the gradient of one whose references have none."""
    batch = next(reused_batches(tiny(), 1))
    options = {"training__global_batch": 1, "parallel__recompute": recompute, "batches": itertools.repeat(batch)}
    spared, _ = train(0.0, training__reference_gradient_every=0, **options)
    reused, _ = train(0.0, training__reuse_memories=100, **options)
    assert [step.encoded > 0 for step in reused] == [True, False, False, False]
    assert norms(reused)[1:] == pytest.approx(norms(spared)[1:], abs=1e-6)
    assert abs(norms(reused)[0] - norms(spared)[0]) > 1e-4


def test_a_recomputed_layer_reads_what_it_read_and_writes_no_more():
    from megatron_m3.model.held_memories import HeldMemories, MemoryTable

    def kept(*numbers):
        part = torch.tensor(numbers, dtype=torch.float32)
        return part.reshape(-1, 1, 1, 1), -part.reshape(-1, 1, 1, 1), part[:, None] > 1

    table = MemoryTable(3)
    table.write(0, torch.tensor([0, 1]), kept(1, 2))
    held = HeldMemories(table=table, read_H=torch.tensor([1]), write_M=torch.tensor([0, -1]))
    first = held.join(0, kept(3, 4))
    assert first[0].flatten().tolist() == [3, 4, 2]
    assert first[2].flatten().tolist() == [True, True, True]
    table.write(0, torch.tensor([0, 1]), kept(5, 6))
    assert all(map(torch.equal, held.join(0, kept(3, 4)), first))
    assert table.read(0, torch.tensor([0, 1]))[1].flatten().tolist() == [-5, -6]


def test_the_table_stays_within_its_bytes():
    plain, _ = train(0.0)
    steps, memories = train(0.0, training__reuse_memories=100, training__reuse_bytes=5 * BYTES + 7)
    held = [part for kept in memories.table._layers.values() for part in kept]
    assert sum(part.nbytes for part in held) == 5 * BYTES
    assert losses(steps) == pytest.approx(losses(plain), abs=1e-6)
    _, all_of_them = train(0.0, training__reuse_memories=100)
    roomy = [part for kept in all_of_them.table._layers.values() for part in kept]
    assert sum(part.nbytes for part in roomy) > 20 * BYTES


def test_room_goes_to_what_was_read_last():
    from megatron_m3.training.reuse import SlotIndex

    index = SlotIndex(3, 10)
    index.next_step()
    assert index.look_up([5, 6, 7])[0] == [False] * 3
    assert index.look_up([5]) == ([True], index.look_up([5])[1])
    assert index.look_up([8])[0] == [False]  # takes the place of 6
    found, slots = index.look_up([5, 6, 7, 8])
    assert found == [True, False, True, True]
    assert slots[1] == -1
    assert sorted([slots[0], *slots[2:]]) == [0, 1, 2]
    assert index.look_up([6])[1] != [-1]
    assert SlotIndex(0, 1).look_up([1]) == ([False], [-1])


@pytest.mark.parametrize("num_slots", [1, 4, 9, 40])
def test_a_slot_holds_what_its_reference_last_wrote_there(num_slots):
    from megatron_m3.training.reuse import SlotIndex

    draw, index, table, written = np.random.default_rng(num_slots), SlotIndex(num_slots, 3), {}, {}
    for step in range(60):
        index.next_step()
        for _ in range(3):
            batch = draw.choice(15, size=draw.integers(1, 7), replace=False).tolist()
            found, slots = index.look_up(batch)
            used = [slot for slot in slots if slot >= 0]
            assert len(used) == len(set(used))
            for reference, held, slot in zip(batch, found, slots, strict=True):
                if held:
                    assert table[slot] == reference
                    assert step - written[slot] < 3
                elif slot >= 0:
                    table[slot], written[slot] = reference, step
    assert set(table) <= set(range(num_slots))


def test_a_stopped_run_goes_on_as_if_it_had_not(run):
    options = {"training__stage": "continual", "training__steps": 6, "training__reuse_memories": 4,
               "checkpoint__every": 3, "training__micro_batch": 4, "schedule__style": "constant",
               "schedule__warmup_fraction": 0}
    _, whole = run("whole", **options)
    run("parts", **options | {"training__steps": 3})
    _, parts = run("parts", **options)
    assert [record["loss"] for record in parts] == [record["loss"] for record in whole]
    assert [record["reused"] for record in parts] == [record["reused"] for record in whole]
    assert all(whole[step]["reused"] > 0 for step in (1, 2, 4, 5))
    _, plain = run("plain", **options | {"training__reuse_memories": 0})
    assert plain[0]["loss"] == pytest.approx(whole[0]["loss"], abs=1e-6)
    assert abs(plain[1]["loss"] - whole[1]["loss"]) > 1e-6
    ratio, other = (record["mfu"] * record["seconds"] for record in (whole[2], plain[2]))
    assert ratio < 0.98 * other


def test_memories_of_weights_that_diverged_are_dropped(run):
    """A learning rate of 30 really diverges; a thousandth of it does not."""
    _, records = run(training__stage="continual", training__steps=4, training__global_batch=4, training__micro_batch=4,
                     training__reuse_memories=100, optimizer__lr=30, optimizer__clip_grad=0, schedule__style="constant",
                     schedule__warmup_fraction=0, guard__spike_steps=2, guard__min_history=1, guard__lr_factor=0.001,
                     checkpoint__every=100)
    [event] = [record for record in records if "event" in record]
    steps = [record for record in records if "event" not in record]
    assert event["from"] > event["to"] == 0
    assert [record["reused"] > 0 for record in steps] == [False, True, True, True]


def test_fewer_kept_tokens_than_before_start_anew():
    from megatron_m3.training.reuse import MemoryStore

    config = tiny(training__reuse_memories=9, training__global_batch=1)
    store, batch = MemoryStore(config, 1), next(reused_batches(config, 1))
    reused = [len(store.next_step([batch], kept)[0]["read_slots"]) > 0 for kept in (16, 16, 4, None)]
    assert reused == [False, True, False, True]


def test_bytes_are_those_of_the_stage_that_holds_most():
    config = tiny(training__reuse_memories=1, training__reuse_bytes=6 * BYTES)
    assert (held_layers(config), memory_bytes(config, 4, 2), num_slots(config, 4, 1)) == ([2], BYTES, 6)
    halves = replace_fields(config, {"parallel.tensor": "2", "parallel.pipeline": "2", "parallel.split": "1,3"})
    assert held_layers(halves) == [1, 1]
    assert memory_bytes(halves, 4, 1) == 4 * (2 * 16 * 4 + 1)
    # no more than two steps can read: 2 * 4 sequences of 4 chunks
    assert num_slots(replace_fields(config, {"training.reuse_memories": "2", "training.reuse_bytes": "99999999"}),
                     4, 1) == 33


def test_what_cannot_work_is_refused():
    from megatron_m3.training.checks import check_run

    with pytest.raises(ConfigError, match=r"training\.reuse_memories=3: needs data\.encode_once=true"):
        tiny(training__reuse_memories=3, data__encode_once="false")
    with pytest.raises(ConfigError, match=r"training\.reuse_memories=-1"):
        tiny(training__reuse_memories=-1)
    short = tiny(training__reuse_memories=3, training__reuse_bytes=2 * BYTES - 1, training__output="somewhere")
    with pytest.raises(ConfigError, match=rf"training\.reuse_bytes={2 * BYTES - 1}: must be at least {2 * BYTES}"):
        check_run(short, 1)
