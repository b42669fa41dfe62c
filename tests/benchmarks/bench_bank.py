"""Bank build beside its floor; for reading see bench_reading.

    python -m tests.benchmarks.bench_bank

A random model of the demo's shape and real glosses. Building: references a second of the whole job's work beside a
bare forward pass through the same layers, and the peak memory of the job at N and at 4 N references. One thread.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_tools import references, tokenizer, wordnet
from megatron_m3.config import ParallelConfig, get_recipe, replace_fields
from megatron_m3.platform import select
from tests.launcher import ROOT

if TYPE_CHECKING:
    from megatron_m3.model.checkpoint import LoadedModel

NUM_REFERENCES, ROUNDS = 1200, 5
PEAK = ("import resource, sys; from launch.build_bank import main; main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")


def make_artifacts(folder: Path) -> "LoadedModel":
    """A checkpoint of random weights, and two knowledge bases of N and 4 N references."""
    from megatron_m3.model.checkpoint import load_model, save_checkpoint
    from megatron_m3.model.gpt import build_model
    from megatron_m3.platform.distributed import initialize_parallel

    config = replace_fields(get_recipe("demo"), {"data.tokenizer": str(folder / "tokenizer")})
    at = lambda name: str(folder / name)  # noqa: E731
    wordnet.main(["--output", at("texts"), "--train-entries", "20000"])
    tokenizer.main(["--input", at("texts/train.jsonl"), "--output", at("tokenizer"),
                    "--vocab-size", str(config.model.vocab_size)])
    for count in (NUM_REFERENCES, 4 * NUM_REFERENCES):
        with (folder / "texts/references.jsonl").open() as lines:
            (folder / f"{count}.jsonl").write_text("".join(itertools.islice(lines, count)))
        references.main(["--input", at(f"{count}.jsonl"), "--tokenizer", at("tokenizer"), "--output", at(str(count))])
    initialize_parallel(ParallelConfig(), seed=1)
    save_checkpoint(folder / "run", 1, build_model(config), config)
    return load_model(folder / "run")


def best(work: Callable[[], object]) -> float:
    """Fewest CPU seconds of some rounds; other processes on the machine count less than in wall time."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def bench_peak_memory(folder: Path) -> dict[str, float]:
    """Peak resident MiB of a whole build job of N and of 4 N references."""
    peaks = {}
    for count in (NUM_REFERENCES, 4 * NUM_REFERENCES):
        paths = {"checkpoint": "run", "references": str(count), "output": f"bank_{count}"}
        words = [word for name, place in paths.items() for word in (f"--{name}", str(folder / place))]
        job = [sys.executable, "-c", PEAK, *words]
        done = subprocess.run(job, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        peaks[f"peak_mib_{count}_references"] = int(done.stdout.split()[-1]) / 1024
    small, large = peaks.values()
    return peaks | {"peak_ratio": large / small}


def bench_build(folder: Path, loaded: "LoadedModel") -> dict[str, float]:
    """References a second: bare forward, encoding, and encoding with codec and records."""
    import torch

    from megatron_m3.memory import MemoryBank, encode_references
    from megatron_m3.memory.encode import BATCH_TOKENS, EncodePlan
    from megatron_m3.references import ReferenceStore

    class BarePlan(EncodePlan):
        def keep(self, *parts: object) -> None:
            pass

    tokens, lengths = ReferenceStore.open(folder / str(NUM_REFERENCES)).tokens(range(512))
    bank = MemoryBank.open(folder / f"bank_{NUM_REFERENCES}")
    prefix, last = torch.tensor(loaded.prefix_ids), loaded.config.memory_layers[-1]

    @torch.no_grad()
    def forward() -> None:
        rows = np.argsort(lengths, kind="stable")
        while len(rows):
            longest = int(lengths[rows[-1]])
            some, rows = np.split(rows[::-1], [BATCH_TOKENS // (len(prefix) + longest)])
            rows = rows[::-1]
            whole = torch.cat([prefix.expand(len(some), -1), torch.from_numpy(tokens[some, :longest]).long()], 1)
            plan = BarePlan([loaded.config], len(prefix), torch.from_numpy(lengths[some]))
            hidden = loaded.model.embedding(whole, None)
            for layer in loaded.model.decoder.layers[:last]:
                hidden, _ = layer(hidden, attention_mask=None, attention_bias=plan)
            top = loaded.model.decoder.layers[last]
            top.self_attention.get_query_key_value_tensors(top.input_layernorm(hidden))

    def records() -> None:
        memories = encode_references(loaded, tokens, lengths)
        bank.record.pack(bank.codec.encode(memories), memories.positions, memories.num_kept)

    bare, encode, whole = best(forward), best(lambda: encode_references(loaded, tokens, lengths)), best(records)
    return {"forward_references_per_second": len(tokens) / bare, "encode_over_forward": encode / bare,
            "build_references_per_second": len(tokens) / whole, "build_over_forward": whole / bare}


def main() -> None:
    """Print the figures as JSON."""
    import torch

    torch.set_num_threads(1)
    select()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loaded = make_artifacts(folder)
        figures = bench_peak_memory(folder) | bench_build(folder, loaded)
    rounded = {name: round(one, 3) if isinstance(one, float) else one for name, one in figures.items()}
    print(json.dumps(rounded, indent=2))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
