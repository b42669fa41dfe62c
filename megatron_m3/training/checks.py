"""Whether a run can work on a number of processes, known before anything heavy is imported."""

from pathlib import Path

from megatron_m3.config import Config
from megatron_m3.config.reuse import held_layers, memory_bytes, most_kept_tokens
from megatron_m3.errors import ConfigError
from megatron_m3.platform.distributed import check_world_size


def check_run(config: Config, world_size: int) -> None:
    """Refuse a run that cannot work on ``world_size`` processes, before anything is allocated.

    Raises:
        ConfigError: names the field and the mend.
    """
    parallel, training = config.parallel, config.training
    if not training.output:
        raise ConfigError("training.output: give the folder of the run")
    if (Path(training.output) / "manifest.json").exists():
        raise ConfigError(
            f"training.output={training.output}: is an artifact of its own, not a run's folder; choose another folder"
        )
    num_micro_batches(config, world_size)
    num_reference_tokens = config.num_references * config.memory.reference_length
    if parallel.sequence and training.stage == "continual" and num_reference_tokens % parallel.tensor:
        raise ConfigError(
            f"parallel.sequence=true: parallel.tensor={parallel.tensor} must divide the {num_reference_tokens} "
            "reference tokens of a sequence (memory.reference_length for each of its references); "
            "change one, or set parallel.sequence=false"
        )
    if config.reuses_memories:
        _check_room(config)


def _check_room(config: Config) -> None:
    """Refuse a table of held memories without room for one, beside the slot of those that find none."""
    size = memory_bytes(config, most_kept_tokens(config), max(held_layers(config)))
    if config.training.reuse_bytes < 2 * size:
        raise ConfigError(
            f"training.reuse_bytes={config.training.reuse_bytes}: must be at least {2 * size}, two memories of "
            f"{size} bytes; or set training.reuse_memories=0"
        )


def num_micro_batches(config: Config, world_size: int) -> int:
    """Micro-batches of each process in a step on ``world_size`` processes.

    Raises:
        ConfigError: the layout or the batch does not go into them.
    """
    parallel, training = config.parallel, config.training
    check_world_size(parallel, world_size)
    data_size = world_size // (parallel.tensor * parallel.pipeline)
    if training.global_batch % (training.micro_batch * data_size):
        raise ConfigError(
            f"training.global_batch={training.global_batch}: must be a multiple of training.micro_batch="
            f"{training.micro_batch} times the {data_size} data-parallel processes"
        )
    micro_batches = training.global_batch // (training.micro_batch * data_size)
    if parallel.interleave > 1 and micro_batches % parallel.pipeline:
        raise ConfigError(
            f"parallel.interleave={parallel.interleave}: the {micro_batches} micro-batches of a step "
            f"(training.global_batch / training.micro_batch / data-parallel processes) must be a multiple of "
            f"parallel.pipeline={parallel.pipeline}"
        )
    return micro_batches


def largest_world(config: Config, num_nodes: int, processes_per_node: int) -> int:
    """The most of ``num_nodes`` nodes that the run can work on.

    The sizes of model parallelism and the batch may not divide by the processes of all of them, as when one has died.

    Raises:
        ConfigError: it can work on none; the refusal of all nodes is told.
    """
    for count in range(num_nodes, 0, -1):
        try:
            check_run(config, count * processes_per_node)
        except ConfigError:
            continue
        return count
    check_run(config, num_nodes * processes_per_node)
    return num_nodes
