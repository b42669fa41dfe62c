"""Settings: section dataclasses, recipes, and the command line made from them. Imports nothing heavy."""

from megatron_m3.config.command_line import (
    dump_json,
    from_dict,
    given_options,
    make_parser,
    parse,
    peek_option,
    replace_fields,
    to_dict,
)
from megatron_m3.config.flops import StepFlops, step_flops
from megatron_m3.config.model import MemoryConfig, ModelConfig
from megatron_m3.config.parallel import ParallelConfig
from megatron_m3.config.recipes import RECIPES, get_recipe, recipe
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
from megatron_m3.config.split import stage_layers

__all__ = [
    "RECIPES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "GuardConfig",
    "LoggingConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ScheduleConfig",
    "StepFlops",
    "TrainingConfig",
    "dump_json",
    "from_dict",
    "get_recipe",
    "given_options",
    "make_parser",
    "parse",
    "peek_option",
    "recipe",
    "replace_fields",
    "stage_layers",
    "step_flops",
    "to_dict",
]
