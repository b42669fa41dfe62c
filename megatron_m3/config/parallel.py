"""How a model is laid over processes, and which layouts it can have."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_m3.config.checks import check_range
from megatron_m3.errors import ConfigError

if TYPE_CHECKING:
    from megatron_m3.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is laid over processes; data parallelism takes what is left."""

    tensor: int = 1
    """Tensor-parallel processes."""
    pipeline: int = 1
    """Pipeline stages."""
    interleave: int = 1
    """Model chunks per pipeline stage (interleaved schedule); 1 is the plain schedule."""
    split: str = "auto"
    """Layers of each pipeline stage: auto, planned by FLOPs so that the slowest is as fast as can be (`m3 plan` shows
    it), or numbers such as 9,12,9; with interleave those of all first chunks, then of all second ones, and so on."""
    context: int = 1
    """Context-parallel processes; only 1 is supported."""
    sequence: bool = False
    """Sequence parallelism of norms and residuals within the tensor-parallel group."""
    distributed_optimizer: bool = False
    """Shard optimizer states over the data-parallel group."""
    recompute: bool = False
    """Recompute every layer's activations in the backward pass."""

    def __post_init__(self) -> None:
        check_range("parallel", self, 1, math.inf, "tensor", "pipeline", "interleave", "context")
        self.split_layers()

    def split_layers(self) -> tuple[int, ...] | None:
        """The numbers of ``split``; None for auto."""
        if self.split == "auto":
            return None
        parts, chunks = [part.strip() for part in self.split.split(",")], self.pipeline * self.interleave
        if not all(map(str.isdecimal, parts)):
            raise ConfigError(f"parallel.split={self.split}: give auto, or numbers of layers such as 9,12,9")
        if len(parts) != chunks:
            raise ConfigError(
                f"parallel.split={self.split}: give {chunks} numbers, one for each of parallel.pipeline="
                f"{self.pipeline} x parallel.interleave={self.interleave} model chunks"
            )
        return tuple(map(int, parts))


def check_parallel(config: "Config") -> None:
    """Refuse a parallel layout that the model cannot have, by the name of the field."""
    parallel, model = config.parallel, config.model
    if parallel.context != 1:
        raise ConfigError(
            f"parallel.context={parallel.context}: context parallelism is not supported with memory; set it to 1"
        )
    for name in ("num_heads", "num_kv_heads", "ffn_size", "padded_vocab_size"):
        if getattr(model, name) % parallel.tensor:
            raise ConfigError(f"parallel.tensor={parallel.tensor}: must divide model.{name}={getattr(model, name)}")
    if config.training.frozen_layers >= model.num_layers:
        raise ConfigError(
            f"training.frozen_layers={config.training.frozen_layers}: the model has {model.num_layers} layers; leave "
            "some to train"
        )
    check_split(config)
    if parallel.interleave > 1 and parallel.pipeline == 1:
        raise ConfigError(f"parallel.interleave={parallel.interleave}: needs parallel.pipeline of at least 2")
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError("parallel.sequence=true: needs parallel.tensor of at least 2")
    if config.training.global_batch % config.training.micro_batch:
        raise ConfigError(
            f"training.global_batch={config.training.global_batch}: must be a multiple of "
            f"training.micro_batch={config.training.micro_batch}"
        )


def check_split(config: "Config") -> None:
    """Refuse pipeline stages that megatron-core cannot have, or that would have nothing to train."""
    parallel, layers, frozen = config.parallel, config.model.num_layers, config.training.frozen_layers
    chunks, given = parallel.pipeline * parallel.interleave, parallel.split_layers()
    if given is None:
        # the first and the last chunk may hold the embedding and the output projection alone
        needed = chunks - 2 + (frozen + 1 if frozen else 0)
        if chunks > 1 and needed > layers:
            raise ConfigError(
                f"parallel.pipeline={parallel.pipeline} with parallel.interleave={parallel.interleave}: "
                f"{chunks} model chunks need at least {needed} layers{' with frozen ones' if frozen else ''}, "
                f"model.num_layers={layers}; take fewer"
            )
        return
    if sum(given) != layers:
        raise ConfigError(f"parallel.split={parallel.split}: adds up to {sum(given)}, not model.num_layers={layers}")
    if chunks > 1 and 0 < frozen >= given[0]:
        raise ConfigError(
            f"training.frozen_layers={frozen}: must leave the first of the stages, which parallel.split="
            f"{parallel.split} gives {given[0]} layers, some to train"
        )
