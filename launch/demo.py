"""m3 demo: the whole job on a real corpus, in minutes on two processor cores.

First a real model: SmolLM2-135M is converted, an MPI job writes its memories of dictionary entries, and it answers from
them what it did not know. Then all from nothing: corpus, tokenizer, dataset, references, embeddings, index, neighbours,
the two training stages, the memory bank, generation with recall, and scores on held-out entries. Every step is the
command that a cluster runs, printed before it runs; finished steps are skipped when the demo is run again. At the end
stand a table, a picture of the loss curves, and a JSON summary.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.demo_steps import MODES, Step, pretrained_steps, scratch_steps
from megatron_m3.config import get_recipe, parse, replace_fields
from megatron_m3.errors import ConfigError, M3Error, exit_on_user_error


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the demo."""

    output: str = "demo"
    """Folder for the table, the picture and summary.json; artifacts go to its folder run."""
    tensor: int = 2
    """Tensor-parallel processes in training."""
    pipeline: int = 1
    """Pipeline stages in training."""
    train_entries: int = 30000
    """Entries that the training documents say."""
    other_entries: int = 8000
    """Entries that only the knowledge base holds."""
    heldout: int = 300
    """Held-out entries that are scored."""
    warmup_steps: int = 160
    """Steps of the warmup stage."""
    continual_steps: int = 110
    """Steps of the continual train."""
    known_entries: int = 1000
    """Entries that SmolLM2 has memories of."""
    questions: int = 100
    """Entries of these that it is scored on."""
    bank_ranks: int = 2
    """MPI processes that write the bank."""
    codec: str = "auto"
    """Codec of the bank: auto, none, fp8, KLT and a number, or a FAISS factory string."""
    fresh: bool = False
    """Start over: remove what an earlier demo left in output/run."""

    def __post_init__(self) -> None:
        least = {"tensor": 1, "pipeline": 1, "train_entries": 1000, "other_entries": 0, "heldout": 2,
                 "warmup_steps": 1, "continual_steps": 1, "known_entries": 1000, "questions": 4, "bank_ranks": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {value}")
        parallel = {"parallel.tensor": str(self.tensor), "parallel.pipeline": str(self.pipeline)}
        replace_fields(get_recipe("demo"), parallel)


def run_steps(steps: Sequence[Step], run: Path, first: int, last: int) -> dict[str, float]:
    """Run what is not finished, in order; seconds of each step, those of earlier runs included.

    The steps are numbers ``first`` and on of the demo's ``last``.

    Raises:
        M3Error: a step failed; what it said stands above.
    """
    from megatron_m3.manifest import atomic_path

    seconds: dict[str, float] = {}
    chain = hashlib.sha256()
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    for number, step in enumerate(steps, first):
        chain.update("\0".join(step.command).encode())
        stamp = run / "finished" / f"{number:02d}_{chain.hexdigest()[:16]}.json"
        if stamp.exists():
            seconds[step.name] = json.loads(stamp.read_text())["seconds"]
            print(f"[{number}/{last}] {step.name}: done before", flush=True)
            continue
        print(f"[{number}/{last}] {step.name}\n  $ {shlex.join(step.command)}", flush=True)
        start = time.monotonic()
        if subprocess.run(step.command, env=environment, check=False).returncode:
            raise M3Error(f"step {step.name} failed: its message stands above; mend it and run the demo again")
        seconds[step.name] = time.monotonic() - start
        with atomic_path(stamp) as temporary:
            temporary.write_text(json.dumps({"seconds": seconds[step.name]}) + "\n")
    return seconds


def read_scores(run: Path) -> dict[str, float]:
    """Nats per token of the held-out targets, by mode."""
    scores = {}
    for mode in MODES:
        rows = [json.loads(line) for line in (run / f"scores_{mode}.jsonl").read_text().splitlines()]
        scores[mode] = sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows)
    return scores


def read_losses(run: Path, stage: str) -> list[tuple[int, float]]:
    """The loss of every step of a stage."""
    records = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record and "event" not in record]


def describe_bank(run: Path) -> dict[str, Any]:
    """What the bank costs on disk."""
    manifest = json.loads((run / "bank" / "manifest.json").read_text())
    references, codec = manifest["settings"]["num_references"], manifest["settings"]["codec"]
    size = sum(record["bytes"] for name, record in manifest["files"].items() if name.startswith("shard_"))
    return {"references": references, "codec": codec, "bytes_per_reference": size // references, "bytes": size}


def summarise(
    options: Options, run: Path, seconds: dict[str, dict[str, float]], losses: dict[str, list[tuple[int, float]]]
) -> dict[str, Any]:
    """Everything the demo measured, as JSON values."""
    return {
        "options": asdict(options),
        "models": {name: {"nats_per_token": read_scores(run / name), "bank": describe_bank(run / name)}
                   for name in seconds},
        "loss": {stage: {"first": rows[0][1], "last": rows[-1][1]} for stage, rows in losses.items()},
        "seconds": {name: {step: round(value, 1) for step, value in times.items()} for name, times in seconds.items()},
        "total_seconds": round(sum(sum(times.values()) for times in seconds.values()), 1),
    }


def table(summary: dict[str, Any]) -> str:
    """The summary for people."""
    from megatron_m3.platform.progress import format_seconds

    models = [summary["models"][name] for name in ("smollm2", "scratch")]
    scores, banks = [model["nats_per_token"] for model in models], [model["bank"] for model in models]

    def row(words: str, values: Sequence[str]) -> str:
        return f"{words:<44}" + "".join(f" {value:>16}" for value in values)

    saved = {"saved by having a memory": "none", "saved by its being the right one": "shuffled"}
    stages = {"warmup": "last training loss, warmup stage", "continual": "last training loss, continual stage"}
    return "\n".join([
        row("", ["SmolLM2-135M", "from nothing"]),
        "definitions not trained on, nats per token",
        *(row(f"  {words}", [f"{score[mode]:.4f}" for score in scores]) for mode, words in MODES.items()),
        *(row(f"  {words}", [f"{score[mode] - score['explicit']:.4f}" for score in scores])
          for words, mode in saved.items()),
        *(row(words, ["", f"{summary['loss'][stage]['last']:.4f}"]) for stage, words in stages.items()),
        row("memories in the bank", [f"{bank['references']:,}" for bank in banks]),
        row("bytes of a memory on disk", [f"{bank['bytes_per_reference']:,}" for bank in banks]),
        row("codec", [bank["codec"] for bank in banks]),
        row("time", [format_seconds(sum(summary["seconds"][name].values())) for name in ("smollm2", "scratch")]),
    ])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo and leave its table, picture and summary."""
    options = parse(Options, argv, "m3 demo", __doc__ or "")
    output = Path(options.output)
    run = output / "run"
    if options.fresh and run.exists():
        shutil.rmtree(run)
    parts = {"smollm2": pretrained_steps(options, run / "smollm2"), "scratch": scratch_steps(options, run / "scratch")}
    seconds: dict[str, dict[str, float]] = {}
    first, last = 1, sum(map(len, parts.values()))
    for name, steps in parts.items():
        seconds[name] = run_steps(steps, run / name, first, last)
        first += len(steps)
    losses = {stage: read_losses(run / "scratch", stage) for stage in ("warmup", "continual")}
    summary = summarise(options, run, seconds, losses)
    shown = table(summary)
    from megatron_m3.evaluation.loss_plot import plot_losses

    plot_losses(losses, output / "loss.png")
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (output / "table.txt").write_text(shown + "\n")
    print(f"\n{shown}\n\nloss curves: {output / 'loss.png'}\nsummary: {output / 'summary.json'}")


if __name__ == "__main__":
    exit_on_user_error(main)
