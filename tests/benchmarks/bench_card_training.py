"""Training steps of m3-0.9b on a card, beside what their arithmetic costs, in one run.

    python -m tests.benchmarks.bench_card_training [--record] [--dry]

Every round takes one step of each kind, in bf16, timed by CUDA events. The floor of a warmup step is its FLOPs at the
card's peak, so its ratio is 1 / MFU; the floor of the others is the warmup step times what FLOPs imply. A spared step
has no gradient through the references; in a halved one two chunks share each. ``--dry`` goes the same way on any
machine with a model of a few layers, and says nothing about a card.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from megatron_m3.config import Config, get_recipe, replace_fields
from megatron_m3.config.flops import ReferenceWork, step_flops
from megatron_m3.platform import select
from megatron_m3.platform.distributed import parallel_world
from tests.benchmarks import results
from tests.benchmarks.bench_training import PREFIX, batches

LIMITS = {("warmup", "step"): 1 / 0.45, ("continual", "step"): 1.05}
"""Largest ratios: 45 % MFU, and a continual step against what FLOPs imply."""
ROUNDS, WARM_ROUNDS = 20, 3


def shape(stage: str, dry: bool) -> Config:
    """m3-0.9b at 2,048 tokens, eight micro-batches of two sequences, on one device."""
    tiny = {"model.num_layers": "4", "model.num_heads": "4", "model.num_kv_heads": "2", "model.hidden_size": "256",
            "model.ffn_size": "256", "model.vocab_size": "512", "training.global_batch": "2",
            "training.micro_batch": "1", "data.sequence_length": "256"}
    sizes = {"training.global_batch": "16", "training.micro_batch": "2", "data.sequence_length": "2048"}
    return replace_fields(get_recipe("m3-0.9b"), {
        **(tiny if dry else sizes), "training.stage": stage, "training.dtype": "bf16"})


def milliseconds(step: Callable[[], object], cuda: bool) -> float:
    """Of one step, by the device's clock where there is one."""
    if not cuda:
        begin = time.process_time()
        step()
        return 1e3 * (time.process_time() - begin)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure(dry: bool) -> tuple[dict[str, list[float]], dict[str, float], Config]:
    """Times of each kind of step in ms, their FLOPs, and the warmup's config."""
    configs = {stage: shape(stage, dry) for stage in ("warmup", "continual")}
    from megatron_m3.training.setup import build_machinery
    from megatron_m3.training.step import training_step

    warmup, continual = configs.values()
    chunks, seen = continual.num_references, len(PREFIX)
    with parallel_world(warmup.parallel, 1) as platform:
        with_memory = build_machinery(continual, platform, PREFIX)
        kinds: dict[str, tuple[Any, Any, bool]] = {
            # the same model without references, so that one is in the card's memory
            "warmup": (replace(with_memory, config=warmup), batches(warmup), True),
            "continual": (with_memory, batches(continual), True),
            "spared": (with_memory, batches(continual), False),
            "halved": (with_memory, batches(continual, 2), True),
        }
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(WARM_ROUNDS + (2 if dry else ROUNDS)):
            for name, (machinery, read, gradient) in kinds.items():
                def step(machinery: Any = machinery, read: Any = read, gradient: bool = gradient) -> None:
                    assert training_step(machinery, read, 1e-5, reference_gradient=gradient).loss < 20

                times[name].append(milliseconds(step, platform.is_cuda))
    work = {"continual": (chunks, 1.0), "spared": (chunks, 0.0), "halved": (chunks / 2, 1.0)}
    flops = {"warmup": step_flops(warmup).total} | {
        name: step_flops(continual, prefix_length=seen,
                         work=ReferenceWork(read=chunks, encoded=encoded, gradient=gradient)).total
        for name, (encoded, gradient) in work.items()}
    return {name: found[WARM_ROUNDS:] for name, found in times.items()}, flops, warmup


def rows(times: dict[str, list[float]], flops: dict[str, float], warmup: Config, peak: float) -> list[dict[str, Any]]:
    """Two rows for each kind of step: its floor, and the step."""
    middle = {name: results.spread(found)[1] for name, found in times.items()}
    made = []
    for name, found in times.items():
        floor = flops[name] / peak / 1e9 if name == "warmup" else middle["warmup"] * flops[name] / flops["warmup"]
        for what, (low, half, high) in (("floor", (floor,) * 3), ("step", results.spread(found))):
            made.append({"shape": "m3-0.9b", "batch": warmup.training.global_batch,
                         "tokens": warmup.data.sequence_length, "what": what, "pass": name, "p20_ms": round(low, 2),
                         "p50_ms": round(half, 2), "p80_ms": round(high, 2), "ratio": round(half / floor, 3)})
    return made


def main() -> None:
    """Print times and ratios to the floors; exit with 1 where a limit is missed."""
    dry = results.dry_run()
    device = select().device
    from megatron_m3.training.metrics import peak_tflops

    peak = peak_tflops(device, torch.bfloat16)
    print(f"peak {peak:,.3g} TFLOP/s")
    met = results.report("training", rows(*measure(dry), peak), {} if dry else LIMITS)
    sys.exit(not met)


if __name__ == "__main__":
    main()
