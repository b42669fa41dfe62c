"""`m3 cost`: the cost of knowledge in each format, and the size of a memory bank, for any model shape.

    m3 cost --recipe m3-2b --plot cost.png
    m3 cost --recipe m3-0.9b --memory.tokens 16 --references 1000000 --gpus 64
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_m3.config import Config, MemoryConfig, ModelConfig, get_recipe, parse, peek_option, to_dict
from megatron_m3.errors import ConfigError, exit_on_user_error


@dataclass(frozen=True, kw_only=True)
class CostOptions:
    """What to compute, and for which shape."""

    recipe: str = "m3-2b"
    """Recipe whose model and memory are taken."""
    references: int = 112_000_000
    """References in the memory bank."""
    codec_bytes: int = 14
    """Bytes of a compressed key or value; 14 is OPQ20_80,Residual2x14,PQ8x10 on 80 numbers."""
    sequence_length: int = 2048
    """Tokens in a training sequence."""
    gpus: int = 0
    """Also tell how fast so many GPUs train, and the size of a checkpoint."""
    peak_tflops: float = 989.0
    """TFLOP/s of one of these GPUs in a large matrix product; 989 is an H100's data sheet."""
    utilisation: float = 0.4
    """Share of that which training is taken to reach."""
    global_batch: int | None = None
    """Sequences in a training step; by default the recipe's."""
    plot: str = ""
    """PNG file for the figure of total cost by expected usage count."""
    json: bool = False
    """Print JSON instead of tables."""
    model: ModelConfig
    memory: MemoryConfig

    def __post_init__(self) -> None:
        for name in ("references", "codec_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        for name, least in (("gpus", 0), ("global_batch", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name}={value}: must be at least {least}")
        if not 0 < self.peak_tflops < math.inf:
            raise ConfigError(f"peak_tflops={self.peak_tflops}: must be above 0, and finite")
        if not 0 < self.utilisation <= 1:
            raise ConfigError(f"utilisation={self.utilisation}: must be above 0 and at most 1")
        if self.plot and Path(self.plot).suffix.lower() != ".png":
            raise ConfigError(f"plot={self.plot}: must end in .png")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the cost table or JSON; draw the figure if asked."""
    from megatron_m3.evaluation.cost import bank_size, cost_table, knowledge_cost
    from megatron_m3.evaluation.pace import Cluster, pace_table, training_pace

    recipe = get_recipe(peek_option(argv, "--recipe", CostOptions.recipe))
    defaults = CostOptions(model=recipe.model, memory=recipe.memory, sequence_length=recipe.data.sequence_length)
    options = parse(CostOptions, argv, "m3 cost", __doc__ or "", defaults)
    data = replace(recipe.data, sequence_length=options.sequence_length)
    batch = options.global_batch or recipe.training.global_batch
    config = Config(model=options.model, memory=options.memory, data=data,
                    training=replace(recipe.training, global_batch=batch))
    cluster = Cluster(gpus=options.gpus, peak_tflops=options.peak_tflops, utilisation=options.utilisation)
    paces = training_pace(config, cluster) if options.gpus else []
    cost, size = knowledge_cost(config), bank_size(config, options.codec_bytes)
    if options.json:
        figures = {"recipe": options.recipe, "flops": asdict(cost), "interval": cost.interval,
                   "bytes_per_reference": asdict(size), "references": options.references,
                   "model": to_dict(config.model), "memory": to_dict(config.memory),
                   "training": [asdict(pace) for pace in paces]}
        json.dump(figures, sys.stdout, indent=2)
        print()
    else:
        print(cost_table(options.recipe, cost, size, options.references))
        if paces:
            print(f"\n{pace_table(cluster, paces)}")
    if options.plot:
        from megatron_m3.evaluation.cost_plot import plot_cost

        plot_cost(Path(options.plot), options.recipe, cost)


if __name__ == "__main__":
    exit_on_user_error(main)
