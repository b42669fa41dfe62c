"""A run's state between steps, and its way into a checkpoint and back, at any parallel layout."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer

from megatron_m3.config import Config, from_dict, to_dict
from megatron_m3.data import TrainingDataset
from megatron_m3.errors import ConfigError
from megatron_m3.manifest import Manifest
from megatron_m3.model.checkpoint import (
    check_same_model,
    check_weights,
    load_state,
    load_weights,
    read_checkpoint,
    save_checkpoint,
)
from megatron_m3.model.gpt import build_model
from megatron_m3.model.weights_hash import sharded_state, sharding_metadata
from megatron_m3.platform import select
from megatron_m3.training.guard import GuardState
from megatron_m3.training.setup import Machinery, prepare_optimizer

FREE_SETTINGS = {"data": ("tokenizer", "tokens", "references", "neighbours", "expected_repeats", "loader", "prefetch"),
                 "memory": ()}
"""Fields of the sections that make the data which may change within a run: places (their hashes count), plans and
speed."""
NEW_RUN = "start a new training.output with training.init_from"


@dataclass(kw_only=True)
class RunState:
    """What a run must remember beside weights and optimizer."""

    step: int = 0
    """Optimizer steps taken."""
    position: int = 0
    """Training sequences passed, read or skipped."""
    guard: GuardState = field(default_factory=GuardState)
    """Memory of the divergence guard."""


def data_hashes(dataset: TrainingDataset) -> dict[str, str]:
    """Hashes of the artifacts that a run trains on, by the field of the data section that names them."""
    hashes = {"tokenizer": dataset.tokens.tokenizer_hash, "tokens": dataset.tokens.hash}
    if dataset.references is not None:
        hashes |= {"references": dataset.references.hash, "neighbours": dataset.neighbours.hash}
    return hashes


def save_run(machinery: Machinery, state: RunState, hashes: dict[str, str], *, good: bool) -> Path:
    """Write the checkpoint of this step, trained on the data of ``hashes``; a collective. Returns its folder."""
    config = machinery.config
    optimizer = machinery.optimizer.sharded_state_dict(_trained_state(machinery), metadata=sharding_metadata())
    sharded = {"optimizer": optimizer, "generators": _generators(_layout())}
    training = {"position": state.position, "guard": state.guard.to_dict(), "layout": list(_layout())}
    return save_checkpoint(Path(config.training.output), state.step, machinery.models, config,
                           state=sharded, training=training, inputs=hashes, good=good)


def load_run(machinery: Machinery, folder: Path, hashes: dict[str, str]) -> RunState:
    """Bring weights, optimizer and generators to a checkpoint's state, and return the rest; a collective.

    ``hashes`` are those of the data that the run goes on with (:func:`data_hashes`).

    Raises:
        ArtifactError: a damaged checkpoint.
        ConfigError: a checkpoint of a model of another shape, precision or kind of optimizer, or of other data.
    """
    check_same_model(folder, machinery.config)
    manifest = read_checkpoint(folder)
    stored = manifest.settings
    _check_same_optimizer(folder, stored["config"], machinery.config)
    _check_same_data(folder, manifest, machinery.config, hashes)
    layout, training = _layout(), stored["training"]
    sharded = sharded_state(machinery.models)
    sharded["optimizer"] = machinery.optimizer.sharded_state_dict(
        _trained_state(machinery), is_loading=True, metadata=sharding_metadata()
    )
    same_layout = tuple(training["layout"]) == layout
    if same_layout:
        sharded["generators"] = _generators(layout)
    loaded = load_state(folder, sharded, whole=True)
    for index, model in enumerate(machinery.models):
        model.load_state_dict(loaded["model" if len(machinery.models) == 1 else f"model{index}"])
    check_weights(folder, machinery.models)
    _restore_optimizer(machinery.optimizer, loaded["optimizer"])
    prepare_optimizer(machinery.optimizer, machinery.config)
    if same_layout:
        _set_generators(loaded["generators"])
    return RunState(step=stored["step"], position=training["position"], guard=GuardState.from_dict(training["guard"]))


def start_from(machinery: Machinery, folder: Path, hashes: dict[str, str]) -> None:
    """Take the weights of another run's checkpoint, and nothing else of it (``training.init_from``); a collective.

    They are rounded where the checkpoint's dtype is not the run's.

    Raises:
        ArtifactError: a damaged checkpoint.
        ConfigError: a checkpoint of a model of another shape, or of another tokenizer.
    """
    config, manifest, models = machinery.config, read_checkpoint(folder), machinery.models
    check_same_model(folder, config)
    if manifest.inputs["tokenizer"] != hashes["tokenizer"]:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer}: the checkpoint {folder} was trained with another "
            f"tokenizer; take {folder / 'tokenizer'} and tokens made with it"
        )
    stored = manifest.settings["config"]["training"]["dtype"]
    if stored != config.training.dtype:
        models = build_model(replace(config, training=replace(config.training, dtype=stored)))
    load_weights(folder, models)
    if models is not machinery.models:
        for mine, theirs in zip(machinery.models, models, strict=True):
            mine.load_state_dict(theirs.state_dict())
    machinery.optimizer.reload_model_params()


def _trained_state(machinery: Machinery) -> dict[str, Any]:
    """The sharded weights that the optimizer's states are named after.

    Usually a weight is one tensor over all layers. Frozen layers have no states, which would leave gaps in it, so a run
    with such layers has one for each layer.
    """
    if not machinery.config.training.frozen_layers:
        return sharded_state(machinery.models)
    return sharded_state(machinery.models, by_layer=True)


def _restore_optimizer(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Load settings and states around two gaps of megatron-core with torch's AdamW.

    A step count of zero is not saved, and the distributed optimizer's loader stumbles over step counts.
    """
    [part] = optimizer.chained_optimizers
    states, whole = loaded.pop("param_state", None), loaded.get("optimizer", loaded).get("state")
    if whole is not None and isinstance(part.optimizer, torch.optim.AdamW):
        whole.setdefault("common_step", torch.tensor(0.0))
    optimizer.load_state_dict(loaded)
    if states is None:
        return
    counts = {parameter: state.pop("step") for parameter, state in part.optimizer.state.items() if "step" in state}
    part.load_parameter_state_from_fully_reshardable(states)
    for parameter, count in counts.items():
        part.optimizer.state[parameter]["step"] = count


def _check_same_optimizer(folder: Path, stored: dict[str, Any], config: Config) -> None:
    for section, name in (("parallel", "distributed_optimizer"), ("training", "dtype"), ("training", "stage"),
                          ("training", "frozen_layers")):
        mine = getattr(getattr(config, section), name)
        if stored[section][name] != mine:
            raise ConfigError(
                f"{section}.{name}={str(mine).lower()}: the run's checkpoint {folder} has "
                f"{str(stored[section][name]).lower()}; make them equal, or {NEW_RUN}"
            )


def _check_same_data(folder: Path, manifest: Manifest, config: Config, hashes: dict[str, str]) -> None:
    """Refuse to go on with sequences, references or a use of memory other than the run had so far."""
    for name, mine in hashes.items():
        if manifest.inputs.get(name) != mine:
            raise ConfigError(
                f"data.{name}={getattr(config.data, name)}: the run's checkpoint {folder} was not trained with it; "
                f"give the {name} of the run, or {NEW_RUN}"
            )
    before, now = to_dict(from_dict(Config, manifest.settings["config"])), to_dict(config)
    for section, free in FREE_SETTINGS.items():
        for name, mine in now[section].items():
            if name not in free and before[section][name] != mine:
                raise ConfigError(
                    f"{section}.{name}={mine}: the run's checkpoint {folder} has {before[section][name]}; "
                    f"make them equal, or {NEW_RUN}"
                )


def _layout() -> tuple[int, int, int]:
    """Pipeline, tensor and data-parallel sizes."""
    return (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        dist.get_world_size() // parallel_state.get_model_parallel_group().size(),
    )


def _generators(layout: tuple[int, int, int]) -> ShardedObject:
    """The states of this process's random generators, at its place in the layout."""
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )
    states = {"torch": torch.get_rng_state(), "megatron": tensor_parallel.get_cuda_rng_tracker().get_states()}
    if select().is_cuda:
        states["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject("generators", states, layout, place)


def _set_generators(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["megatron"])
    if select().is_cuda:
        torch.cuda.set_rng_state(states["cuda"])
