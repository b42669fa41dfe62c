"""Recipes: named functions that return a full config. A run is a recipe plus overrides."""

from collections.abc import Callable

from megatron_m3.config.model import MemoryConfig, ModelConfig
from megatron_m3.config.parallel import ParallelConfig
from megatron_m3.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    GuardConfig,
    LoggingConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)
from megatron_m3.errors import ConfigError

RECIPES: dict[str, Callable[[], Config]] = {}


def recipe(function: Callable[[], Config]) -> Callable[[], Config]:
    """Register a recipe under its function's name, underscores as dashes."""
    RECIPES[function.__name__.replace("_", "-")] = function
    return function


def get_recipe(name: str) -> Config:
    """The config that recipe ``name`` returns."""
    if name not in RECIPES:
        raise ConfigError(f"recipe={name}: unknown; known are {', '.join(RECIPES)}")
    return RECIPES[name]()


@recipe
def m3_2b() -> Config:
    """The paper's model: 2.4 B non-embedding parameters, the first 22 of 44 layers are memory layers."""
    return Config(
        model=ModelConfig(num_layers=44, num_heads=40, num_kv_heads=8, head_size=80, hidden_size=3200, ffn_size=3200,
                          vocab_size=60416),
        parallel=ParallelConfig(tensor=8, sequence=True, distributed_optimizer=True, recompute=True),
        training=TrainingConfig(steps=1_000_000, global_batch=2048),
    )


@recipe
def m3_09b() -> Config:
    """The paper's ablation model: 0.92 B non-embedding parameters, the first 20 of 40 layers are memory layers."""
    return Config(
        model=ModelConfig(num_layers=40, num_heads=32, num_kv_heads=8, head_size=64, hidden_size=2048, ffn_size=2048,
                          vocab_size=60416),
        parallel=ParallelConfig(distributed_optimizer=True),
        training=TrainingConfig(steps=100_000, global_batch=2048),
    )


RECIPES["m3-0.9b"] = RECIPES.pop("m3-09b")


@recipe
def tiny() -> Config:
    """A model of a few thousand parameters for tests: 4 layers, the first 2 are memory layers."""
    return Config(
        model=ModelConfig(num_layers=4, num_heads=4, num_kv_heads=2, head_size=16, hidden_size=64, ffn_size=64,
                          vocab_size=512),
        memory=MemoryConfig(tokens="4", reference_length=16, chunk_length=8, window=2, references_per_chunk=2),
        data=DataConfig(sequence_length=32),
        optimizer=OptimizerConfig(lr=1e-3),
        training=TrainingConfig(steps=10, global_batch=4, micro_batch=2, dtype="fp32"),
    )


@recipe
def demo() -> Config:
    """A model of a million parameters that learns WordNet glosses on two processor cores in minutes."""
    return Config(
        model=ModelConfig(num_layers=4, num_heads=4, num_kv_heads=2, head_size=32, hidden_size=128, ffn_size=256,
                          vocab_size=4096, tie_embeddings=True),
        data=DataConfig(sequence_length=512),
        optimizer=OptimizerConfig(lr=4e-3),
        schedule=ScheduleConfig(warmup_fraction=0.05),
        training=TrainingConfig(steps=300, global_batch=8, micro_batch=8, dtype="fp32"),
        checkpoint=CheckpointConfig(every=100),
        logging=LoggingConfig(every=10),
    )


@recipe
def smollm2_135m() -> Config:
    """SmolLM2-135M learns to read sparse memories of lessons (m3 data lessons): minutes on a GPU, hours on two cores.

    The kept tokens fall from all to 8, so the loss rises on the way and the guard, which would take that for
    divergence, is off.
    """
    return Config(
        model=ModelConfig(num_layers=30, num_heads=9, num_kv_heads=3, head_size=64, hidden_size=576, ffn_size=1536,
                          vocab_size=49152, rope_theta=100000.0, max_positions=8192, tie_embeddings=True),
        memory=MemoryConfig(layers="8-24", curriculum=0.3, spread=8),
        # lessons state what their references say, which the filter would take for a leak
        data=DataConfig(sequence_length=512, references_per_sequence=5, max_overlap=1.0),
        optimizer=OptimizerConfig(lr=6e-4, weight_decay=0.01),
        schedule=ScheduleConfig(warmup_fraction=0.02, decay_fraction=0.3),
        training=TrainingConfig(stage="continual", steps=180, global_batch=32, micro_batch=8, frozen_layers=8),
        checkpoint=CheckpointConfig(every=20, keep=2),
        guard=GuardConfig(enabled=False),
        logging=LoggingConfig(every=5),
    )
