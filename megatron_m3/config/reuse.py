"""How many memories a process holds for later steps, and what one weighs: the same on all processes of a replica."""

from megatron_m3.config.schema import Config
from megatron_m3.config.split import stage_layers


def held_layers(config: Config) -> list[int]:
    """Memory layers of each pipeline stage."""
    stages, counts, first = config.parallel.pipeline, [0] * config.parallel.pipeline, 0
    for chunk, layers in enumerate(stage_layers(config)):
        counts[chunk % stages] += len(set(range(first, first + layers)) & set(config.memory_layers))
        first += layers
    return counts


def most_kept_tokens(config: Config) -> int:
    """Tokens kept of a full reference in the step of a run that keeps most."""
    return config.memory.reference_length if config.memory.curriculum else config.memory.num_kept_tokens


def memory_bytes(config: Config, num_kept: int, layers: int) -> int:
    """Bytes of one memory in ``layers`` memory layers of a process: keys, values, and which tokens are real."""
    numbers = 2 * config.model.num_kv_heads // config.parallel.tensor * config.model.head_size
    return layers * num_kept * (numbers * (2 if config.training.dtype == "bf16" else 4) + 1)


def num_slots(config: Config, num_kept: int, data_size: int) -> int:
    """Slots for memories, one of them for those that find no room: within ``training.reuse_bytes`` on every process,
    and no more than can be read before they are too old.

    Args:
        config: of the run.
        num_kept: tokens kept of a full reference.
        data_size: replicas that share a global batch.
    """
    training = config.training
    read = training.reuse_memories * (training.global_batch // data_size) * config.num_references
    return min(training.reuse_bytes // memory_bytes(config, num_kept, max(held_layers(config))), read + 1)
