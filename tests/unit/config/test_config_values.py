"""Settings that cannot work are refused by name; recipes have the sizes that the paper gives."""

import pytest

from megatron_m3.config import Config, MemoryConfig, get_recipe, replace_fields
from megatron_m3.errors import ConfigError


def changed(**fields: str) -> Config:
    """The tiny recipe with fields replaced, double underscores for dots."""
    return replace_fields(get_recipe("tiny"), {name.replace("__", "."): text for name, text in fields.items()})


@pytest.mark.parametrize(("name", "billions"), [("m3-2b", "2.433"), ("m3-0.9b", "0.9227")])
def test_recipes_have_the_papers_number_of_parameters(name: str, billions: str) -> None:
    """The figures count weight matrices; the norms add less than 0.02 %."""
    model = get_recipe(name).model
    norms = (2 * model.num_layers + 1) * model.hidden_size
    matrices = model.num_non_embedding_parameters - norms
    assert f"{matrices / 1e9:.4g}" == billions


def test_the_papers_memory_layers_are_the_first_half() -> None:
    assert get_recipe("m3-2b").memory_layers == tuple(range(22))
    assert get_recipe("m3-0.9b").memory_layers == tuple(range(20))


def test_an_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"recipe=m4: unknown; known are m3-2b, m3-0\.9b"):
        get_recipe("m4")


@pytest.mark.parametrize(("layers", "expected"), [
    ("all", (0, 1, 2, 3, 4)), ("first-half", (0, 1)), ("1-3", (1, 2, 3)), ("4", (4,)), ("0-1,3", (0, 1, 3)),
    ("3,0", (0, 3)), ("1,1-2", (1, 2)),
])
def test_memory_layers(layers: str, expected: tuple[int, ...]) -> None:
    assert MemoryConfig(layers=layers).memory_layers(5) == expected


def test_a_single_layer_has_a_first_half() -> None:
    assert MemoryConfig().memory_layers(1) == (0,)


def test_memory_heads_are_by_memory_layer() -> None:
    memory = MemoryConfig(layers="1,3", heads="3:1,0;1:2")
    assert list(memory.memory_heads(5, 3).items()) == [(1, (2,)), (3, (0, 1))]
    assert MemoryConfig(layers="1,3").memory_heads(5, 2) == {1: (0, 1), 3: (0, 1)}


@pytest.mark.parametrize("layers", ["5", "2-5", "half", "", "1-", "-1", "3-1", "1;2", "1-2-3", "²"])
def test_impossible_memory_layers(layers: str) -> None:
    with pytest.raises(ConfigError, match=r"memory\.layers="):
        MemoryConfig(layers=layers).memory_layers(5)


@pytest.mark.parametrize(("layers", "reason"), [
    ("0-99999999999", "the model has layers 0-4"), ("7-6", "7-6 is reversed; give 6-7"),
])
def test_the_ends_of_a_range_are_compared_before_it_is_built(layers: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        MemoryConfig(layers=layers).memory_layers(5)


def test_kept_tokens_are_at_most_the_reference() -> None:
    assert MemoryConfig(tokens="all").num_kept_tokens == 128
    assert MemoryConfig(tokens="500").num_kept_tokens == 128
    assert MemoryConfig(tokens="16").num_kept_tokens == 16


@pytest.mark.parametrize(("fields", "named"), [
    ({"model__num_kv_heads": "3"}, "model.num_kv_heads=3"),
    ({"model__head_size": "15"}, "model.head_size=15"),
    ({"model__vocab_multiple": "0"}, "model.vocab_multiple=0"),
    ({"memory__layers": "0-4"}, "memory.layers=0-4: the model has layers 0-3"),
    ({"memory__layers": "1", "memory__heads": "1:0;2:1"}, "memory.heads=1:0;2:1: must name each memory layer once"),
    ({"memory__layers": "1,2", "memory__heads": "1:0"}, "memory.heads=1:0: must name each memory layer once"),
    ({"memory__layers": "1", "memory__heads": "1:0;1:1"}, "memory.heads=1:0;1:1: must name each memory layer once"),
    ({"memory__layers": "1", "memory__heads": "1:2"}, "memory.heads=1:2: the model has key-value heads 0-1"),
    ({"memory__layers": "1", "memory__heads": "1:"}, "memory.heads=1:: give all, or the heads of each layer"),
    ({"memory__layers": "1", "memory__heads": "some"}, "memory.heads=some: give all, or the heads of each layer"),
    ({"memory__tokens": "some"}, "memory.tokens=some"),
    ({"memory__tokens": "0"}, "memory.tokens=0"),
    ({"memory__prefix": "a\udcff"}, "memory.prefix='a\\udcff': not UTF-8"),
    ({"memory__window": "0"}, "memory.window=0"),
    ({"data__sequence_length": "30"}, "data.sequence_length=30"),
    ({"data__sequence_length": "0"}, "data.sequence_length=0"),
    ({"data__max_overlap": "1.5"}, "data.max_overlap=1.5"),
    ({"training__steps": "0"}, "training.steps=0"),
    ({"training__micro_batch": "0"}, "training.micro_batch=0"),
    ({"training__micro_batch": "3"}, "training.global_batch=4"),
    ({"optimizer__lr": "nan"}, "optimizer.lr=nan"),
    ({"optimizer__lr": "0"}, "optimizer.lr=0"),
    ({"optimizer__lr": "inf"}, "optimizer.lr=inf"),
    ({"optimizer__weight_decay": "inf"}, "optimizer.weight_decay=inf"),
    ({"optimizer__beta1": "2"}, "optimizer.beta1=2"),
    ({"optimizer__beta2": "1"}, "optimizer.beta2=1"),
    ({"optimizer__beta2": "nan"}, "optimizer.beta2=nan"),
    ({"model__rope_theta": "0"}, "model.rope_theta=0"),
    ({"model__norm_epsilon": "-1e-5"}, "model.norm_epsilon=-1e-05"),
    ({"model__init_std": "nan"}, "model.init_std=nan"),
    ({"guard__spike_factor": "inf"}, "guard.spike_factor=inf"),
    ({"training__seed": "-1"}, "training.seed=-1"),
    ({"training__seed": "2147483648"}, "training.seed=2147483648"),
    ({"data__seed": "-1"}, "data.seed=-1"),
    ({"schedule__decay_fraction": "-0.1"}, "schedule.decay_fraction=-0.1"),
    ({"checkpoint__every": "0"}, "checkpoint.every=0"),
    ({"guard__lr_factor": "2"}, "guard.lr_factor=2"),
    ({"logging__every": "0"}, "logging.every=0"),
    ({"parallel__tensor": "0"}, "parallel.tensor=0"),
    ({"parallel__tensor": "4"}, "parallel.tensor=4: must divide model.num_kv_heads=2"),
    ({"parallel__pipeline": "7"}, "parallel.pipeline=7 with parallel.interleave=1: 7 model chunks need at least 5"),
    ({"parallel__pipeline": "2", "parallel__interleave": "4"}, "parallel.pipeline=2 with parallel.interleave=4"),
    ({"parallel__pipeline": "2", "parallel__split": "even"}, "parallel.split=even: give auto, or numbers"),
    ({"parallel__pipeline": "2", "parallel__split": "1,2,1"}, "parallel.split=1,2,1: give 2 numbers"),
    ({"parallel__pipeline": "2", "parallel__split": "1,2"}, "parallel.split=1,2: adds up to 3"),
    ({"parallel__pipeline": "2", "parallel__split": "1,3", "training__frozen_layers": "1"}, "training.frozen_layers=1"),
    ({"parallel__interleave": "2"}, "parallel.interleave=2"),
    ({"parallel__context": "2"}, "parallel.context=2"),
    ({"parallel__sequence": "true"}, "parallel.sequence=true"),
])
def test_impossible_values_are_named(fields: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(**fields)
    assert str(caught.value).startswith(named.split(":")[0])
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_possible_parallel_sizes_pass() -> None:
    assert changed(parallel__tensor="2", parallel__pipeline="4", parallel__sequence="true").parallel.pipeline == 4
