"""The planned split of a pipeline beside the even one: what each stage really works, and how far off the plan was.

    python -m tests.benchmarks.bench_pipeline [rounds]

On 2 and on 4 processes, a round takes one continual step with each split. A stage's work is the processor time of its
process in the forward and backward passes (best of the rounds), in which waiting does not count: the slowest stage
bounds the pipeline wherever each has a device of its own. On this machine's shared cores the wall time says little.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_m3.config import Config, get_recipe, replace_fields, stage_layers
from megatron_m3.config.split import chunk_costs, even_layers
from megatron_m3.platform import select
from megatron_m3.platform.distributed import parallel_world
from tests.benchmarks.bench_training import PREFIX, batches
from tests.launcher import run_ranks

MODULE = "tests.benchmarks.bench_pipeline"


def shape(stages: int, **parallel: str) -> Config:
    """A model large enough that arithmetic is timed, not overhead; the first 6 of 12 layers see references."""
    return replace_fields(get_recipe("demo"), {
        "model.num_layers": "12", "model.num_heads": "8", "model.num_kv_heads": "2", "model.head_size": "32",
        "model.hidden_size": "256", "model.ffn_size": "512", "training.stage": "continual",
        "training.global_batch": str(2 * stages), "training.micro_batch": "1", "parallel.pipeline": str(stages),
    } | {f"parallel.{name}": value for name, value in parallel.items()})


def splits(stages: int) -> dict[str, Config]:
    """The same run with the two splits."""
    even = even_layers(shape(stages).model.num_layers, stages)
    return {"even": shape(stages, split=",".join(map(str, even))), "planned": shape(stages)}


class PassClock:
    """Reads the process's clock where the passes of a step have ended and the optimizer begins."""

    def __init__(self, machinery: Any) -> None:
        self.ended, self._update = 0.0, machinery.optimizer.step
        machinery.optimizer.step = self._step

    def _step(self) -> Any:
        self.ended = time.process_time()
        return self._update()


def rank_main(output: Path, stages: int, rounds: int) -> None:
    """On each process: best processor seconds of its passes, and middle wall seconds of a step, by split."""
    torch.set_num_threads(1)
    select()
    from megatron_m3.training.setup import build_machinery
    from megatron_m3.training.step import training_step

    found: dict[str, Any] = {}
    with parallel_world(shape(stages).parallel, 1) as platform:
        runs = {name: (build_machinery(config, platform, PREFIX), batches(config))
                for name, config in splits(stages).items()}
        worked: dict[str, list[float]] = {name: [] for name in runs}
        took: dict[str, list[float]] = {name: [] for name in runs}
        losses: dict[str, float] = {}
        clocks = {name: PassClock(machinery) for name, (machinery, _) in runs.items()}
        for _ in range(rounds + 1):
            for name, (machinery, read) in runs.items():
                dist.barrier()
                start, began = time.process_time(), time.perf_counter()
                losses[name] = training_step(machinery, read, 1e-4).loss
                took[name].append(time.perf_counter() - began)
                worked[name].append(clocks[name].ended - start)
        assert abs(losses["even"] - losses["planned"]) < 1e-3, "not the same model"
        for name in runs:
            gathered: list[float] = [0.0] * stages
            dist.all_gather_object(gathered, min(worked[name][1:]))
            found[name] = {"work": gathered, "wall": statistics.median(took[name][1:])}
        if dist.get_rank() == 0:
            output.write_text(json.dumps(found))


def report(stages: int, found: dict[str, Any]) -> None:
    """Print shares and ratios beside what the plan says."""
    print(f"{stages} stages")
    slowest: dict[str, tuple[float, float]] = {}
    for name, config in splits(stages).items():
        layers, work = stage_layers(config), found[name]["work"]
        flops = [sum(cost) for cost in chunk_costs(config, layers)]
        slowest[name] = max(flops), max(work)
        for stage, count in enumerate(layers):
            planned, real = flops[stage] / sum(flops), work[stage] / sum(work)
            print(f"  {name:<8}stage {stage} {count:3} layers   FLOPs {100 * planned:5.1f} %   "
                  f"work {work[stage]:6.2f} s = {100 * real:5.1f} %   off by {100 * (real / planned - 1):+6.1f} %")
    planned, real = (slowest["planned"][place] / slowest["even"][place] for place in (0, 1))
    print(f"  slowest stage, planned / even: {real:.3f}, by FLOPs {planned:.3f}: "
          f"off by {100 * (real / planned - 1):+.1f} %   {'met' if real < 1 else 'MISSED'}")
    work = sum(found["planned"]["work"]) / sum(found["even"]["work"])
    wall = found["planned"]["wall"] / found["even"]["wall"]
    print(f"  work of all stages, planned / even: {work:.3f}; wall time here: {wall:.3f}")


def main() -> None:
    """Measure on 2 and 4 processes."""
    if len(sys.argv) > 2:
        rank_main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
        return
    rounds = sys.argv[1] if len(sys.argv) > 1 else "5"
    with tempfile.TemporaryDirectory() as folder:
        for stages in (2, 4):
            output = Path(folder) / f"{stages}.json"
            run_ranks(MODULE, stages, [str(output), str(stages), rounds], timeout=3000)
            report(stages, json.loads(output.read_text()))


if __name__ == "__main__":
    main()
