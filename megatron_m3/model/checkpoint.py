"""Checkpoints on disk: one folder a step, complete or absent, for any parallel layout.

    step_0000100/   manifest.json (config, weights hash, checksums), tokenizer/, and the files of dist_checkpointing

A checkpoint is written to a hidden folder that gets its name when everything is on disk. Weights are stored by their
place in the global model, so that a checkpoint of one layout is read by any other.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist

from megatron_m3.config import Config, ParallelConfig, from_dict, to_dict
from megatron_m3.errors import ArtifactError, ConfigError, M3Error
from megatron_m3.manifest import Manifest, check_files, read_manifest, tell_kept, write_manifest
from megatron_m3.model.checkpoint_files import check_checksums, global_bytes, hash_files, write_shards
from megatron_m3.model.weights_hash import sharded_state, weights_hash
from megatron_m3.platform.distributed import initialize_parallel, on_first_process

if TYPE_CHECKING:
    import torch
    from megatron.core.models.gpt import GPTModel

    from megatron_m3.tokenizer import Tokenizer

KIND, SCHEMA = "checkpoint", 1
FOLDER = re.compile(r"step_\d{7,}")


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What a checkpoint says of its model, without the weights."""

    config: Config
    """Settings it was trained with; of a loaded model parallel and dtype are those of loading, attention is auto."""
    tokenizer: "Tokenizer"
    """The tokenizer it was trained with."""
    weights_hash: str
    """Fingerprint of the weights as they stand on disk; memory banks name their model by it."""
    prefix_ids: list[int]
    """Token ids of the prefix, its BOS included."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel(ModelDescription):
    """A model read from a checkpoint, with all that belongs to it."""

    model: "GPTModel"
    """The weights of this process, in evaluation mode."""

    @property
    def device(self) -> "torch.device":
        """Where the weights are."""
        return next(self.model.parameters()).device


def checkpoint_folder(output: Path, step: int) -> Path:
    """Folder of the checkpoint after ``step`` steps."""
    return Path(output) / f"step_{step:07d}"


def checkpoint_step(folder: Path) -> int:
    """Steps taken before a checkpoint, from its folder's name."""
    return int(folder.name.removeprefix("step_"))


def list_checkpoints(output: Path, *, good: bool = False) -> list[Path]:
    """Complete checkpoints of a run, oldest first; with ``good`` only those taken while no divergence was suspected."""
    if not Path(output).is_dir():
        return []
    found = sorted((path for path in Path(output).iterdir() if FOLDER.fullmatch(path.name)), key=checkpoint_step)
    return [path for path in found if not good or read_checkpoint(path).settings["good"]]


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint that a folder is, or the newest one of the run that it is."""
    return (list_checkpoints(folder) or [Path(folder)])[-1]


def read_checkpoint(folder: Path) -> Manifest:
    """The manifest of a checkpoint, its files' sizes checked.

    Raises:
        ArtifactError: not a complete checkpoint.
    """
    manifest = read_manifest(Path(folder), KIND, SCHEMA)
    check_files(Path(folder), manifest)
    return manifest


def remove_checkpoints(output: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints; the newest good one always stays. 0 keeps all."""
    if not keep:
        return
    kept = set(list_checkpoints(output)[-keep:]) | set(list_checkpoints(output, good=True)[-1:])
    for folder in list_checkpoints(output):
        if folder not in kept:
            remove_checkpoint(folder)


def remove_checkpoint(folder: Path) -> None:
    """Remove one checkpoint, or the link to one; its name goes first, so that no half of it looks complete."""
    if folder.is_symlink():
        folder.unlink()
        return
    hidden = folder.with_name(f".{folder.name}.removed")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def save_checkpoint(output: Path, step: int, models: Sequence[Any], config: Config, *,
                    state: dict[str, Any] | None = None, training: dict[str, Any] | None = None,
                    inputs: dict[str, str] | None = None, good: bool = True) -> Path:
    """Write the checkpoint after ``step`` steps; a collective over all processes.

    Args:
        output: folder of the run.
        step: optimizer steps taken.
        models: model chunks of this process.
        config: settings of the run, ``data.tokenizer`` among them.
        state: further tensors and objects as dist_checkpointing takes them: optimizer, generators.
        training: further plain values for the manifest: data position, guard.
        inputs: hashes of the artifacts it was trained on, by role; the tokenizer's is added.
        good: whether training was healthy when it was taken.

    Raises:
        M3Error: no space or no permission on disk; nothing is left behind.
    """
    from megatron_m3.tokenizer import Tokenizer

    folder = checkpoint_folder(output, step)
    temporary = folder.with_name(f".{folder.name}.tmp")
    sharded = sharded_state(models) | (state or {})
    fingerprint, needed = weights_hash(models), global_bytes(sharded)
    tokenizer = Tokenizer.load(Path(config.data.tokenizer))

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
        if needed > free:
            raise OSError(f"{needed:,} bytes needed, {free:,} free")
        tokenizer.save(temporary / "tokenizer")

    def finish() -> None:
        settings = {"config": to_dict(config), "weights_hash": fingerprint, "step": step, "good": good,
                    "training": training or {}}
        write_manifest(temporary, Manifest(kind=KIND, schema=SCHEMA, settings=settings, files=files,
                                           inputs=(inputs or {}) | {"tokenizer": tokenizer.hash}))
        was_there = folder.exists()
        if was_there:
            remove_checkpoint(folder)
        temporary.rename(folder)
        if not was_there:
            tell_kept()

    try:
        on_first_process(begin)
        write_shards(sharded, temporary)
        files = hash_files(temporary)
        on_first_process(finish)
    except OSError as error:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror or error
        raise M3Error(f"{folder}: cannot save: {reason}; free space or choose another training.output") from None
    return folder


def load_state(folder: Path, sharded: dict[str, Any], *, whole: bool = False) -> dict[str, Any]:
    """Read what ``sharded`` describes from a checkpoint; a collective.

    Args:
        folder: the checkpoint.
        sharded: what to read, as dist_checkpointing takes it.
        whole: verify the checksums of all files, else not those of the tensors.

    Raises:
        ArtifactError: a file is missing or damaged, or lacks something asked for.
    """
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException

    check_checksums(folder, read_checkpoint(folder), lambda name: whole or not name.endswith(".distcp"))
    try:
        return dist_checkpointing.load(sharded, str(folder))
    except (Exception, CheckpointException) as error:  # whatever damaged bytes provoke; the latter is no Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtifactError(f"{folder}: cannot be read ({reason[:200]}); take another checkpoint") from error


def load_weights(folder: Path, models: Sequence[Any]) -> str:
    """Fill the model chunks of this process with a checkpoint's weights, and check them; a collective.

    Returns:
        The weights' fingerprint.

    Raises:
        ArtifactError: the weights are not the ones that were saved.
    """
    loaded = load_state(folder, sharded_state(models))
    for index, chunk in enumerate(models):
        chunk.load_state_dict(loaded["model" if len(models) == 1 else f"model{index}"])
    return check_weights(folder, models)


def check_weights(folder: Path, models: Sequence[Any]) -> str:
    """Check that the model chunks hold exactly a checkpoint's weights, and return their fingerprint; a collective."""
    recorded = read_checkpoint(folder).settings["weights_hash"]
    if weights_hash(models) != recorded:
        raise ArtifactError(f"{folder}: the weights differ from those saved; a file is damaged, take another one")
    return str(recorded)


def check_same_model(folder: Path, config: Config) -> None:
    """Refuse a checkpoint of another model; how it began, and what computes its attention, may differ.

    Raises:
        ConfigError: names the first field that differs.
    """
    stored = read_checkpoint(folder).settings["config"]["model"]
    for name, value in to_dict(config.model).items():
        if name not in ("init_std", "attention") and stored.get(name) != value:
            raise ConfigError(f"model.{name}={value}: the checkpoint {folder} has {stored.get(name)}; make them equal")


def describe_model(folder: Path) -> ModelDescription:
    """What a checkpoint, or a run's newest one, says of its model; no weights are read.

    Raises:
        ArtifactError: no checkpoint there, or a damaged one.
    """
    from megatron_m3.tokenizer import Tokenizer

    folder = newest_checkpoint(folder)
    settings, tokenizer = read_checkpoint(folder).settings, Tokenizer.load(folder / "tokenizer")
    config = from_dict(Config, settings["config"])
    return ModelDescription(config=config, tokenizer=tokenizer, weights_hash=settings["weights_hash"],
                            prefix_ids=tokenizer.prefix_ids(config.memory.prefix))


def load_model(folder: Path, *, tensor: int = 1, pipeline: int = 1,
               dtype: Literal["fp32", "bf16"] | None = None) -> LoadedModel:
    """Read a model for inference on ``tensor`` processes, whatever layout it was trained with.

    Args:
        folder: one checkpoint (``step_0000100``), or a run's folder, whose newest one is taken.
        tensor: tensor-parallel processes; the world is joined if it has not been.
        pipeline: pipeline stages; with more than one, the model is this process's stage.
        dtype: fp32 or bf16; by default what it was trained with.

    Raises:
        ArtifactError: no checkpoint there, or a damaged one.
        ConfigError: ``tensor`` or ``pipeline`` does not divide the model.
    """
    from megatron_m3.platform import select

    select()
    from megatron.core import parallel_state

    from megatron_m3.model.gpt import DTYPES, build_model
    from megatron_m3.tokenizer import Tokenizer

    folder = newest_checkpoint(folder)
    settings = read_checkpoint(folder).settings
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    config = from_dict(Config, settings["config"])
    # nothing is trained here, so stages of frozen layers are as good as others, and generation takes local modules; and
    # this may be another device
    training = replace(config.training, frozen_layers=0, transformer_impl="local")
    config = replace(config, parallel=parallel, training=training, model=replace(config.model, attention="auto"))
    tokenizer = Tokenizer.load(folder / "tokenizer")
    if not parallel_state.model_parallel_is_initialized():
        initialize_parallel(config.parallel, config.training.seed)
    model = build_model(config)[0]
    fingerprint = load_weights(folder, [model])
    if dtype is not None:
        config = replace(config, training=replace(config.training, dtype=dtype))
        model = model.to(DTYPES[dtype])
        model.config.params_dtype, model.config.bf16 = DTYPES[dtype], dtype == "bf16"
        model.config.pipeline_dtype = DTYPES[dtype]
    # megatron-core's linear layers do less for weights that are not trained
    return LoadedModel(model=model.eval().requires_grad_(False), config=config, tokenizer=tokenizer,
                       weights_hash=fingerprint, prefix_ids=tokenizer.prefix_ids(config.memory.prefix))
