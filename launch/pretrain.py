"""`m3 pretrain`: train a model, alone or under torchrun.

    m3 pretrain --recipe demo --training.output run --data.tokens tokens --data.tokenizer tokenizer
    torchrun --nproc-per-node 4 -m launch.pretrain --recipe m3-0.9b --parallel.tensor 2 --parallel.pipeline 2 ...
"""

import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_m3.config import (
    RECIPES,
    Config,
    from_dict,
    get_recipe,
    given_options,
    make_parser,
    replace_fields,
    to_dict,
)
from megatron_m3.errors import ConfigError, exit_on_user_error
from megatron_m3.training.telling import lone_errors_told

if TYPE_CHECKING:
    from megatron_m3.training.loop import Summary


def parse_config(argv: Sequence[str] | None) -> Config:
    """The settings of a training run."""
    return parse_run(Config, argv, "m3 pretrain", __doc__ or "")


def parse_run[T: Config](cls: type[T], argv: Sequence[str] | None, prog: str, what: str) -> T:
    """A recipe or a config file, with the fields of ``cls`` given on the command line replaced.

    A run that starts from a checkpoint has its model: those fields of the recipe give way to the checkpoint's.
    """
    parser = make_parser(
        cls, prog,
        f"{what.strip()}\n\nStart from a recipe or a config file; every option below replaces one field of it.\n"
        "The defaults shown are those without a recipe.",
    )
    parser.usage = "%(prog)s --recipe NAME|--config FILE [options]"
    parser.add_argument("--recipe", metavar="NAME", help=f"named settings to start from: {', '.join(RECIPES)}")
    parser.add_argument("--config", metavar="FILE", help="JSON file to start from, such as the config.json of a run")
    given = given_options(parser.parse_args(argv))
    recipe, file = given.pop("recipe"), given.pop("config")
    if (recipe is None) == (file is None):
        raise ConfigError("recipe: give --recipe NAME or --config FILE, one of them")
    base = get_recipe(recipe) if recipe else _read_config(Path(file))
    start = given.get("training.init_from", base.training.init_from)
    output = given.get("training.output", base.training.output)
    base = _with_model_of(Path(start), Path(output), base) if start else base
    return replace_fields(cls(**{field.name: getattr(base, field.name) for field in fields(base)}), given)


def _with_model_of(start: Path, output: Path, base: Config) -> Config:
    """``base`` with the model that a run in ``output`` has, or, before its first checkpoint, that of ``start``.

    A run that goes on needs what it started from no more.
    """
    from megatron_m3.model.checkpoint import list_checkpoints, newest_checkpoint, read_checkpoint

    newest = (list_checkpoints(output) or [newest_checkpoint(start)])[-1]
    stored = read_checkpoint(newest).settings["config"]["model"]
    kept = {name: value for name, value in stored.items() if name not in ("attention", "init_std")}
    return from_dict(Config, to_dict(base) | {"model": to_dict(base.model) | kept})


def _read_config(path: Path) -> Config:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"config={path}: cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config={path}: must hold a JSON object")
    return from_dict(Config, values)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, train, and say how it ended."""
    with lone_errors_told():
        summary = _train(parse_config(argv))
    if os.environ.get("RANK", "0") == "0":
        loss = "" if summary.loss is None else f", loss {summary.loss:.4f}"
        print(f"{'trained' if summary.finished else 'left after'} {summary.step} steps{loss}; "
              f"checkpoint {summary.checkpoint}")


def _train(config: Config) -> "Summary":
    from megatron_m3.platform import select

    select()
    from megatron_m3.training.loop import train

    return train(config)


if __name__ == "__main__":
    exit_on_user_error(main)
