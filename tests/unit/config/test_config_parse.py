"""From a command line to settings: types, unknown names, bad values, round trips."""

from dataclasses import dataclass, field

import pytest

from megatron_m3.config import (
    RECIPES,
    Config,
    ModelConfig,
    dump_json,
    from_dict,
    get_recipe,
    make_parser,
    parse,
    peek_option,
    replace_fields,
    to_dict,
)
from megatron_m3.config.command_line import field_docs
from megatron_m3.errors import ConfigError, UnsupportedError


@dataclass(frozen=True, kw_only=True)
class Options:
    """A job's options."""

    input: str
    """Where from."""
    layers: tuple[int, ...] = (1, 2)
    """Which: 100% of them."""
    limit: int | None = 3
    """How many."""
    fast: bool = False
    """Quickly."""
    deep_too: bool = False
    """Thoroughly."""
    model: ModelConfig = field(default_factory=ModelConfig)


def parsed(*argv: str) -> Options:
    return parse(Options, argv, "m3 job", "A job.")


def test_options_become_fields_of_their_types() -> None:
    options = parsed("--input", "a", "--layers", "4,5", "--limit", "none", "--fast", "--model.num-layers=8",
                     "--model.norm_epsilon", "1e-6")
    expected = Options(input="a", layers=(4, 5), limit=None, fast=True,
                       model=ModelConfig(num_layers=8, norm_epsilon=1e-6))
    assert options == expected


def test_options_not_given_keep_their_defaults() -> None:
    assert parsed("--input", "a", "--fast", "false") == Options(input="a")
    defaults = Options(input="b", limit=7)
    assert parse(Options, ["--fast"], "m3 job", "", defaults) == Options(input="b", limit=7, fast=True)


@pytest.mark.parametrize(("argv", "named"), [
    (["--input", "a", "--speed", "3"], "--speed"),
    (["--input", "a", "--model.layers", "3"], "--model.layers"),
    (["--input", "a", "--lim", "3"], "--lim"),
    (["--input", "a", "stray"], "stray"),
    ([], "--input"),
    (["--input"], "--input"),
    (["--input", "a", "--limit", "many"], "limit=many"),
    (["--input", "a", "--layers", "1,x"], "layers=x"),
    (["--input", "a", "--fast", "maybe"], "--fast=maybe"),
    (["--input", "a", "--deep_too=maybe"], "--deep-too=maybe"),
    (["--input", "a", "--model.num-heads", "0"], "model.num_heads=0"),
])
def test_a_mistake_is_one_line_that_names_it(argv: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(*argv)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_choices_are_listed_when_one_is_wrong() -> None:
    with pytest.raises(ConfigError, match=r"schedule\.style=step: choose from wsd, cosine, constant"):
        replace_fields(Config(), {"schedule.style": "step"})


def test_an_option_can_be_read_ahead() -> None:
    assert peek_option(["--x", "1", "--recipe", "demo", "--help"], "--recipe", "tiny") == "demo"
    assert peek_option(["--x=1", "--recipe=demo"], "--recipe", "tiny") == "demo"
    assert peek_option(["--x"], "--recipe", "tiny") == "tiny"


def test_help_shows_every_field_with_its_docstring() -> None:
    text = make_parser(Options, "m3 job", "A job.").format_help()
    assert "Which: 100% of them. (default: 1,2)" in " ".join(text.split())
    for name in ("--input", "--limit", "--model.num-kv-heads"):
        assert name in text


@pytest.mark.parametrize("section", list(Config.__dataclass_fields__))
def test_every_setting_is_documented(section: str) -> None:
    cls = type(getattr(Config(), section))
    assert set(field_docs(cls)) == set(cls.__dataclass_fields__)


@pytest.mark.parametrize("name", list(RECIPES))
def test_dictionaries_round_trip(name: str) -> None:
    config = get_recipe(name)
    assert from_dict(Config, to_dict(config)) == config
    assert dump_json(config).startswith('{\n  "model": {')


def test_dictionaries_with_unknown_or_misplaced_fields_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.depth: unknown field"):
        from_dict(Config, {"model": {"depth": 3}})
    with pytest.raises(ConfigError, match="model: must be an object"):
        from_dict(Config, {"model": 3})
    with pytest.raises(ConfigError, match=r"model\.num_layers\.x: unknown field"):
        replace_fields(Config(), {"model.num_layers.x": "1"})
    with pytest.raises(ConfigError, match="unknown field"):
        replace_fields(Config(), {"model": "1"})


@pytest.mark.parametrize(("values", "named"), [
    ({"model": {"num_layers": "4"}}, 'model.num_layers="4": must be a whole number'),
    ({"model": {"num_layers": 4.0}}, "model.num_layers=4.0: must be a whole number"),
    ({"model": {"num_layers": True}}, "model.num_layers=true: must be a whole number"),
    ({"model": {"num_layers": None}}, "model.num_layers=null: must be a whole number"),
    ({"optimizer": {"lr": "1"}}, 'optimizer.lr="1": must be a number'),
    ({"optimizer": {"lr": True}}, "optimizer.lr=true: must be a number"),
    ({"optimizer": {"lr": [1]}}, "optimizer.lr=[1]: must be a number"),
    ({"training": {"dtype": "fp8"}}, "training.dtype=fp8: choose from fp32, bf16"),
    ({"training": {"dtype": ["bf16"]}}, "training.dtype=['bf16']: choose from fp32, bf16"),
    ({"guard": {"enabled": 1}}, "guard.enabled=1: must be true or false"),
    ({"memory": {"tokens": 8}}, "memory.tokens=8: must be text"),
])
def test_dictionaries_with_values_of_another_type_are_refused(values: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Config, values)
    assert str(caught.value) == named


def test_dictionaries_from_a_file_give_the_fields_of_the_class() -> None:
    assert from_dict(Config, {"optimizer": {"lr": 1}}).optimizer.lr == 1
    assert from_dict(Options, {"input": "a", "layers": [3], "limit": None}) == Options(
        input="a", layers=(3,), limit=None)
    with pytest.raises(ConfigError, match=r"layers=3: must be a list"):
        from_dict(Options, {"input": "a", "layers": 3})


@pytest.mark.parametrize("name", ["model.num-experts", "model.moe", "moe", "model.moe-router-topk", "parallel.expert",
                                  "num_experts"])
def test_mixture_of_experts_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"{name.replace('_', '-')}: mixture of experts is not supported"):
        parsed("--input", "a", f"--{name}", "8")
    with pytest.raises(UnsupportedError, match="mixture of experts is not supported"):
        parsed("--input", "a", f"--{name}=8")
    with pytest.raises(UnsupportedError, match=r"model\.num_experts: mixture of experts"):
        from_dict(Config, {"model": {"num_experts": 8}})
