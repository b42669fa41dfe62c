"""m3 demo: the whole job on a real corpus, in minutes on two processor cores.

Corpus, tokenizer, dataset, references, embeddings, index, neighbours, the two training stages, the memory bank written
by MPI, generation with recall, and scores on held-out entries. Every step is the command that a cluster runs, printed
before it runs; finished steps are skipped when the demo is run again. At the end stand a table, a picture of the loss
curves, and a JSON summary.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_m3.config import get_recipe, parse, replace_fields
from megatron_m3.errors import ConfigError, M3Error, exit_on_user_error
from megatron_m3.manifest import read_manifest

MODES = {
    "none": "without memory",
    "explicit": "with memory",
    "shuffled": "with another entry's memory",
    "text": "with the reference as text in the prompt",
}


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
    warmup_steps: int = 250
    """Steps of the warmup stage."""
    continual_steps: int = 150
    """Steps of the continual train."""
    bank_ranks: int = 2
    """MPI processes that write the bank."""
    codec: str = "auto"
    """Codec of the bank: auto, none, or a FAISS factory string."""
    fresh: bool = False
    """Start over: remove what an earlier demo left in output/run."""

    def __post_init__(self) -> None:
        least = {"tensor": 1, "pipeline": 1, "train_entries": 1000, "other_entries": 0, "heldout": 2,
                 "warmup_steps": 1, "continual_steps": 1, "bank_ranks": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {value}")
        parallel = {"parallel.tensor": str(self.tensor), "parallel.pipeline": str(self.pipeline)}
        replace_fields(get_recipe("demo"), parallel)


class Step(NamedTuple):
    """One command of the demo."""

    name: str
    command: list[str]


def tool(*words: str | Path) -> list[str]:
    """A subcommand of m3 in this Python."""
    return [sys.executable, "-m", "launch.m3", *map(str, words)]


def training(options: Options, run: Path, stage: str, steps: int, *more: str | Path) -> Step:
    """One training stage under torchrun."""
    ranks = options.tensor * options.pipeline
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
               "-m", "launch.pretrain", "--recipe", "demo", "--training.stage", stage, "--training.steps", str(steps),
               "--training.output", str(run / stage), "--data.tokens", str(run / "tokens"),
               "--data.tokenizer", str(run / "tokenizer"), "--parallel.tensor", str(options.tensor),
               "--parallel.pipeline", str(options.pipeline), *map(str, more)]
    return Step(f"{stage} stage, {ranks} processes", command)


def steps(options: Options, run: Path) -> list[Step]:
    """The commands of the demo, in order."""
    texts, tokenizer, checkpoint = run / "texts", run / "tokenizer", run / "continual"
    references, index, bank = run / "references", run / "index", run / "bank"
    return [
        Step("texts", tool("data", "wordnet", "--output", texts, "--train-entries", str(options.train_entries),
                           "--other-entries", str(options.other_entries), "--heldout", str(options.heldout),
                           "--longest-gloss", "90", "--reference-characters", "180")),
        Step("tokenizer", tool("data", "tokenizer", "--input", texts / "train.jsonl", "--vocab-size", "4096",
                               "--output", tokenizer)),
        Step("training tokens", tool("data", "tokenize", "--input", texts / "train.jsonl", "--tokenizer", tokenizer,
                                     "--output", run / "tokens")),
        Step("references", tool("data", "references", "--input", texts / "references.jsonl", "--tokenizer", tokenizer,
                                "--output", references)),
        Step("embeddings", tool("data", "embed", "--references", references, "--output", run / "embeddings")),
        Step("index", tool("data", "index", "--references", references, "--embeddings", run / "embeddings",
                           "--output", index)),
        Step("neighbours", tool("data", "neighbours", "--tokens", run / "tokens", "--references", references,
                                "--tokenizer", tokenizer, "--index", index, "--output", run / "neighbours")),
        training(options, run, "warmup", options.warmup_steps),
        training(options, run, "continual", options.continual_steps, "--training.init-from", run / "warmup",
                 "--data.references", references, "--data.neighbours", run / "neighbours"),
        Step(f"memory bank, {options.bank_ranks} MPI processes",
             [str(Path(sys.executable).with_name("mpiexec")), "-n", str(options.bank_ranks),
              *tool("bank", "build", "--checkpoint", checkpoint, "--references", references, "--output", bank,
                    "--codec", options.codec)]),
        Step("generation with recall",
             tool("generate", "--checkpoint", checkpoint, "--bank", bank, "--references", references, "--index", index,
                  "--input", texts / "prompts.jsonl", "--max-new-tokens", "96")),
        *(Step(f"score {words}",
               tool("score", "--checkpoint", checkpoint, "--input", texts / "heldout.jsonl", "--mode", mode,
                    "--output", run / f"scores_{mode}.jsonl"))
          for mode, words in MODES.items()),
    ]


def run_steps(steps: Sequence[Step], run: Path) -> dict[str, float]:
    """Run what is not finished, in order; seconds of each step, those of earlier runs included.

    Raises:
        M3Error: a step failed; what it said stands above.
    """
    seconds: dict[str, float] = {}
    chain = hashlib.sha256()
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    for number, step in enumerate(steps, 1):
        chain.update("\0".join(step.command).encode())
        stamp = run / "finished" / f"{number:02d}_{chain.hexdigest()[:16]}.json"
        if stamp.exists():
            seconds[step.name] = json.loads(stamp.read_text())["seconds"]
            print(f"[{number}/{len(steps)}] {step.name}: done before", flush=True)
            continue
        print(f"[{number}/{len(steps)}] {step.name}\n  $ {shlex.join(step.command)}", flush=True)
        start = time.monotonic()
        if subprocess.run(step.command, env=environment, check=False).returncode:
            raise M3Error(f"step {step.name} failed: its message stands above; mend it and run the demo again")
        seconds[step.name] = time.monotonic() - start
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(json.dumps({"seconds": seconds[step.name]}) + "\n")
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
    manifest = read_manifest(run / "bank", "bank", 1)
    references, codec = manifest.settings["num_references"], manifest.settings["codec"]
    size = sum(record["bytes"] for name, record in manifest.files.items() if name.startswith("shard_"))
    return {"references": references, "codec": codec, "bytes_per_reference": size // references, "bytes": size}


def summarise(
    options: Options, run: Path, seconds: dict[str, float], losses: dict[str, list[tuple[int, float]]]
) -> dict[str, Any]:
    """Everything the demo measured, as JSON values."""
    return {
        "options": asdict(options),
        "nats_per_token": read_scores(run),
        "loss": {stage: {"first": rows[0][1], "last": rows[-1][1]} for stage, rows in losses.items()},
        "bank": describe_bank(run),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "total_seconds": round(sum(seconds.values()), 1),
    }


def table(summary: dict[str, Any]) -> str:
    """The summary for people."""
    from megatron_m3.platform.progress import format_seconds

    scores, bank = summary["nats_per_token"], summary["bank"]
    lines = [f"{'held-out definitions':<44} nats per token"]
    lines += [f"  {words:<42} {scores[mode]:>14.4f}" for mode, words in MODES.items()]
    lines += [
        f"  {'saved by having a memory':<42} {scores['none'] - scores['explicit']:>14.4f}",
        f"  {'saved by its being the right one':<42} {scores['shuffled'] - scores['explicit']:>14.4f}",
        f"{'last training loss, warmup stage':<44} {summary['loss']['warmup']['last']:>14.4f}",
        f"{'last training loss, continual stage':<44} {summary['loss']['continual']['last']:>14.4f}"
        "  (chunks retrieve with their own text)",
        f"{'memories in the bank':<44} {bank['references']:>14,}",
        f"{'bytes of a memory on disk':<44} {bank['bytes_per_reference']:>14,}  (codec {bank['codec']})",
        f"{'time':<44} {format_seconds(summary['total_seconds']):>14}",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo and leave its table, picture and summary."""
    options = parse(Options, argv, "m3 demo", __doc__ or "")
    output = Path(options.output)
    run = output / "run"
    if options.fresh and run.exists():
        shutil.rmtree(run)
    seconds = run_steps(steps(options, run), run)
    losses = {stage: read_losses(run, stage) for stage in ("warmup", "continual")}
    summary = summarise(options, run, seconds, losses)
    shown = table(summary)
    from megatron_m3.evaluation.loss_plot import plot_losses

    plot_losses(losses, output / "loss.png")
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (output / "table.txt").write_text(shown + "\n")
    print(f"\n{shown}\n\nloss curves: {output / 'loss.png'}\nsummary: {output / 'summary.json'}")


if __name__ == "__main__":
    exit_on_user_error(main)
