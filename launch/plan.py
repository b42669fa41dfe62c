"""`m3 plan`: what each pipeline stage of a run has, does and holds, before anything is started.

    m3 plan --recipe m3-2b --training.stage continual --parallel.pipeline 4 --processes 64

It takes the options of `m3 pretrain`, so a run's own command line can be shown by its plan.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from launch.pretrain import parse_run
from megatron_m3.config import Config, to_dict
from megatron_m3.errors import ConfigError, exit_on_user_error


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Config):
    """A run, and how many processes it shall have."""

    processes: int = 0
    """Processes of the run; 0 is one for each tensor-parallel part of each stage, without data parallelism."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.processes < 0:
            raise ConfigError(f"processes={self.processes}: must be at least 0")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan as a table or JSON."""
    options = parse_run(PlanOptions, argv, "m3 plan", __doc__ or "")
    from megatron_m3.evaluation.pipeline_plan import pipeline_plan, plan_table

    processes = options.processes or options.parallel.tensor * options.parallel.pipeline
    plan = pipeline_plan(options, processes)
    if options.json:
        json.dump(asdict(plan) | {"config": to_dict(options)}, sys.stdout, indent=2)
        print()
    else:
        print(plan_table(options, plan))


if __name__ == "__main__":
    exit_on_user_error(main)
