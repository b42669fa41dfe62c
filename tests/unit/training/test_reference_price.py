"""Cheaper references: encoded once for all their readers, and without a gradient in some steps."""

import numpy as np
import pytest
import torch

from megatron_m3.config import get_recipe, replace_fields
from megatron_m3.config.flops import layer_flops, step_flops
from megatron_m3.config.split import part_costs
from megatron_m3.data.micro_batch import stack_sequences
from megatron_m3.errors import ConfigError
from megatron_m3.platform import select
from tests.tiny_model import joined_world

PREFIX = torch.tensor([1, 7, 9])
IDS = [[4, 7, 4, 4], [7, -1, 9, 4]]
"""References of the chunks of two sequences: three different ones for seven readers."""


def tiny(**overrides):
    fields = {"training.stage": "continual", "model.init_std": "0.1", "training.global_batch": "2"}
    return replace_fields(get_recipe("tiny"), fields | {key.replace("__", "."): value
                                                        for key, value in overrides.items()})


def sequences(config, chosen=IDS):
    """Sequences as the dataset gives them, whose chunks have the references ``chosen``."""
    draw = np.random.default_rng(0)
    texts, lengths = draw.integers(3, 512, (10, 16)), draw.integers(2, 17, 10)
    for ids in map(np.array, chosen):
        chunks = np.flatnonzero(ids >= 0)
        kept, places = np.full(len(ids), -1), np.full(len(ids), -1)
        kept[: len(chunks)], places[chunks] = ids[chunks], np.arange(len(chunks))
        there = kept >= 0
        yield {"context": draw.integers(3, 512, 32), "labels": draw.integers(3, 512, 32),
               "references": np.where(there[:, None], texts[kept], 0), "reference_ids": kept,
               "reference_lengths": np.where(there, lengths[kept], 0), "chunk_references": places}


def micro_batch(config, chosen=IDS):
    arrays = stack_sequences(list(sequences(config, chosen)), config)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(autouse=True)
def selected():
    select()


@pytest.fixture
def passed():
    """``passed(config, batch)``: losses of each token and gradients of each weight, in double precision."""
    from megatron_m3.model.gpt import build_model, training_forward

    def run(config, batch, **options):
        with joined_world():
            model = build_model(config)[0].double()
            losses = training_forward(model, batch, config, PREFIX, **options)
            losses.sum().backward()
            return losses.detach(), {name: weight.grad for name, weight in model.named_parameters()}

    return run


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0])
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], msg=lambda text, name=name: f"{name}: {text}")


def test_encoded_once_gives_the_same_loss_and_gradients(passed):
    each, once = (tiny(data__encode_once=value) for value in ("false", "true"))
    batches = micro_batch(each), micro_batch(once)
    assert [batch["references"].shape for batch in batches] == [(2, 4, 16), (2, 2, 16)]
    assert (batches[1]["reference_lengths"] > 0).sum() == 3
    assert_same(passed(each, batches[0]), passed(once, batches[1]))


def test_a_micro_batch_without_references_keeps_a_place(passed):
    nothing = [[-1] * 4] * 2
    config = tiny()
    batch, full = micro_batch(config, nothing), micro_batch(tiny(data__encode_once="false"), nothing)
    assert [one["references"].shape for one in (batch, full)] == [(2, 1, 16), (2, 4, 16)]
    expected = passed(config, full)
    for gradient in (True, False):
        torch.testing.assert_close(passed(config, batch, reference_gradient=gradient)[0], expected[0])


def test_places_are_as_many_as_sequence_parallel_ranks_divide():
    config = tiny(memory__reference_length="9", parallel__tensor="2", parallel__sequence="true")
    one = {name: array[..., :9] if name == "references" else array for name, array in next(sequences(config)).items()}
    assert stack_sequences([one], config)["references"].shape == (1, 2, 9)
    one["reference_ids"] = np.array([4, 7, 8, 9])
    assert stack_sequences([one], config)["references"].shape == (1, 4, 9)
    one["reference_ids"] = np.array([4, 7, 8, 4])
    assert stack_sequences([one], config)["references"].shape == (1, 4, 9)


@pytest.mark.parametrize("overrides", [
    {}, {"parallel__recompute": "true"}, {"memory__layers": "1,3"}])
def test_a_spared_step_is_one_whose_memories_are_detached(passed, monkeypatch, overrides):
    """References move the loss through memories alone, so this is the joint pass cut there."""
    from megatron_m3.model.layout import JointLayout

    config = tiny(**overrides)
    batch = micro_batch(config)
    joint, spared = passed(config, batch), passed(config, batch, reference_gradient=False)
    choose = JointLayout.choose

    def choose_detached(*arguments):
        key, value, valid = choose(*arguments)
        return key.detach(), value.detach(), valid

    monkeypatch.setattr(JointLayout, "choose", choose_detached)
    assert_same(spared, passed(config, batch))
    torch.testing.assert_close(spared[0], joint[0])
    assert any((gradient - joint[1][name]).abs().max() > 1e-4 for name, gradient in spared[1].items())


def test_nothing_of_spared_references_is_kept_for_the_backward_pass():
    from megatron_m3.model.gpt import build_model, training_forward

    kept = {}
    for gradient in (True, False):
        seen = set()
        with joined_world(), torch.autograd.graph.saved_tensors_hooks(
                lambda tensor, seen=seen: seen.add(tensor.shape[0]) or tensor, lambda tensor: tensor):
            config = tiny(data__encode_once="false")
            training_forward(build_model(config)[0], micro_batch(config), config, PREFIX, reference_gradient=gradient)
        kept[gradient] = seen
    passed = 4 * 16 + 3  # references and the prefix
    assert passed + 32 in kept[True]
    assert not {passed, passed + 32} & kept[False]


def test_a_stopped_run_goes_on_with_the_same_steps_spared(run):
    options = {"training__stage": "continual", "training__steps": 5, "training__reference_gradient_every": 3,
               "checkpoint__every": 2, "training__micro_batch": 4, "schedule__style": "constant",
               "schedule__warmup_fraction": 0}
    _, whole = run("whole", **options)
    run("parts", **options | {"training__steps": 2})
    _, parts = run("parts", **options)
    assert [record["loss"] for record in parts] == [record["loss"] for record in whole]
    _, every = run("every", **options | {"training__reference_gradient_every": 1})
    assert [one["loss"] == other["loss"] for one, other in zip(whole, every, strict=True)] == [True] * 2 + [False] * 3
    assert all(0 <= record["repeats"] < 0.5 for record in whole)
    assert any(record["repeats"] for record in whole)
    ratios = [other["mfu"] * other["seconds"] / (one["mfu"] * one["seconds"])
              for one, other in zip(whole, every, strict=True)]
    assert [ratio > 1.01 for ratio in ratios] == [False, True, True, False, True]


def test_flops_know_what_is_spared():
    base = replace_fields(get_recipe("m3-2b"), {"training.stage": "continual"})
    full, none, half, once = (
        step_flops(replace_fields(base, changes)) for changes in (
            {}, {"training.reference_gradient_every": "0"}, {"training.reference_gradient_every": "2"},
            {"data.expected_repeats": "0.5"}))
    assert none.references == pytest.approx(full.references / 3)
    assert half.references == pytest.approx(full.references * 2 / 3)
    assert once.references == pytest.approx(full.references / 2)
    assert once.selection == pytest.approx(full.selection / 2)
    assert {full.reading, full.context} == {half.reading, once.context} | {full.context, once.reading}
    spared = replace_fields(base, {"training.reference_gradient_every": "0"})
    first = layer_flops(spared)[0]
    forward, backward = part_costs(spared)[1]
    assert forward == pytest.approx(first.forward)
    # m3-2b recomputes its layers, but not the references that have no backward pass
    assert backward == pytest.approx(3 * (first.context + first.reading))


def test_repeats_are_not_expected_where_each_is_encoded():
    with pytest.raises(ConfigError, match=r"data\.expected_repeats=0\.5: needs data\.encode_once=true"):
        tiny(data__expected_repeats="0.5", data__encode_once="false")
    with pytest.raises(ConfigError, match=r"training\.reference_gradient_every=-1"):
        tiny(training__reference_gradient_every="-1")
