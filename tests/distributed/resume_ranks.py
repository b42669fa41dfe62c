"""Ranks of test_resume: whole runs, one after another, in one world; each is a layout, an output and overrides."""

import json
import sys

import torch

from megatron_m3.config import get_recipe, replace_fields
from megatron_m3.platform import select
from megatron_m3.platform.distributed import initialize_parallel, shut_down


def main() -> None:
    """``resume_ranks RUNS``: RUNS is a JSON list of overrides of the tiny recipe."""
    torch.set_num_threads(1)
    select()
    from megatron.core import parallel_state

    from megatron_m3.training.loop import train_in_world

    for overrides in json.loads(sys.argv[1]):
        config = replace_fields(get_recipe("tiny"), overrides)
        train_in_world(config, initialize_parallel(config.parallel, config.training.seed))
        parallel_state.destroy_model_parallel()
    shut_down()


if __name__ == "__main__":
    main()
