"""Building a bank beside its floors, in CPU seconds, which other processes disturb little (reading: bench_reading).

    python -m tests.benchmarks.bench_bank [--checkpoint RUN --references REFERENCES] [--count 256] [--codec auto]
    python -m tests.benchmarks.bench_bank --growth 1000,10000,100000

References a second of the whole work (reading, model, codec, records, files) beside a bare forward pass of the same
tokens in the same batches through the same layers, and what each step takes; the peak memory of the job at N and 4 N
references; the job on 1 and on 2 ranks. Without a checkpoint: a random model of the demo's shape and real glosses.
With --growth: the job with a tiny model and random references of many numbers. One thread a rank.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools import references, tokenizer, wordnet
from megatron_m3.config import ParallelConfig, get_recipe, replace_fields
from megatron_m3.platform import select
from tests.launcher import ROOT

if TYPE_CHECKING:
    from megatron_m3.memory.bank_order import BankJob
    from megatron_m3.model.checkpoint import LoadedModel

NUM_REFERENCES, ROUNDS, BLOCK = 1200, 2, 128
JOB = ("import resource, sys, time; from launch.build_bank import main; main(sys.argv[1:]); "
       "print('MEASURED', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), file=sys.stderr)")


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


def make_random_references(folder: Path, like: Path, count: int, length: int) -> None:
    """A knowledge base of ``count`` random references, for the tokenizer of the one in ``like``."""
    from megatron_m3.manifest import BlockFolder, Manifest, read_manifest, write_manifest
    from megatron_m3.references.store import KIND, SCHEMA, arrays_of_block

    manifest, generator = read_manifest(like, KIND, SCHEMA), np.random.default_rng(count)
    settings = {"reference_length": length, "block_size": 16384}
    blocks = BlockFolder(folder, {"count": count})
    firsts = range(0, count, settings["block_size"])
    for index, first in enumerate(firsts):
        rows = generator.integers(2, 300, (min(settings["block_size"], count - first), length))
        lengths = generator.integers(length // 2, length + 1, len(rows))
        pieces = [("", row[:size], "", 0) for row, size in zip(rows.tolist(), lengths, strict=True)]
        blocks.write(index, arrays_of_block(pieces, length, 512))
    write_manifest(folder, Manifest(kind=KIND, schema=SCHEMA, inputs=manifest.inputs, settings=settings,
                                    files=blocks.files(len(firsts))))


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of all threads of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def run_job(ranks: int, **options: object) -> list[tuple[float, float]]:
    """Peak resident MiB and CPU seconds of each rank of a whole build."""
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    launcher = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(ranks)] if ranks > 1 else []
    done = subprocess.run([*launcher, sys.executable, "-c", JOB, *words], cwd=ROOT, check=True, text=True,
                          capture_output=True)
    measured = [line.split() for line in done.stderr.splitlines() if line.startswith("MEASURED")]
    return [(int(peak) / 1024, float(seconds)) for _, peak, seconds in measured]


def bench_peak_memory(folder: Path) -> dict[str, float]:
    """Peak resident MiB of a whole build job of N and of 4 N references, and of what its plan says."""
    peaks = {}
    for count in (NUM_REFERENCES, 4 * NUM_REFERENCES):
        [(peak, _)] = run_job(1, checkpoint=folder / "run", references=folder / str(count),
                              output=folder / f"bank_{count}")
        peaks[f"peak_mib_{count}_references"] = peak
    small, large = peaks.values()
    return peaks | {"peak_ratio": large / small}


def bench_ranks(folder: Path, checkpoint: Path, references: Path) -> dict[str, float]:
    """CPU seconds of a whole job on two ranks, those of starting included, over those on one."""
    seconds = {}
    for ranks in (1, 2):
        found = run_job(ranks, checkpoint=checkpoint, references=references, output=folder / f"ranks_{ranks}")
        seconds[f"cpu_seconds_{ranks}_ranks"] = sum(one for _, one in found)
    return seconds


def bench_build(folder: Path, checkpoint: Path, references: Path, count: int, codec: str) -> dict[str, Any]:
    """References a CPU second: bare forward, encoding, with codec and records, and the whole work with its files."""
    import torch
    from mpi4py import MPI

    from megatron_m3.config.bank import BankConfig
    from megatron_m3.memory.bank import ShardFolder
    from megatron_m3.memory.bank_codec import prepare_codec
    from megatron_m3.memory.bank_order import BankJob
    from megatron_m3.memory.build import write_missing
    from megatron_m3.memory.work import Crew
    from megatron_m3.model.checkpoint import load_model

    options = BankConfig(checkpoint=str(checkpoint), references=str(references), output=str(folder / "measured"),
                         codec=codec, codec_sample=min(count, 512), block_size=BLOCK)
    job = BankJob.open(options, load_model)
    crew, shards = Crew(MPI.COMM_SELF), ShardFolder(job.folder, job.key)
    coder = prepare_codec(job, crew, job.folder / "codec")
    settings = job.settings(coder.name, coder.token_bytes)
    settings = type(settings)(**vars(settings) | {"num_references": count})
    groups = [np.asarray(settings.block(index)) for index in range(settings.num_blocks)]
    memories = [job.encode(group) for group in groups]
    codes = [coder.encode(some) for some in memories]

    def whole() -> None:
        for index in range(settings.num_blocks):
            shards.discard(index)
        write_missing(job, crew, shards, coder, settings)

    steps = {
        "forward": lambda: [forward(job, group) for group in groups],
        "encode": lambda: [job.encode(group) for group in groups],
        "codec": lambda: [coder.encode(some) for some in memories],
        "pack": lambda: [settings.record.pack(code, some.positions, some.num_kept)
                         for code, some in zip(codes, memories, strict=True)],
        "whole": whole,
    }
    with torch.no_grad():
        rounds = [{name: cpu_seconds(step) for name, step in steps.items()} for _ in range(ROUNDS)]
    least = {name: min(one[name] for one in rounds) for name in steps}
    figures = {f"{name}_over_forward": seconds / least["forward"] for name, seconds in least.items()}
    return {"codec": coder.name, "references": count, "tokens": int(job.lengths[:count].mean()),
            "vectors": 2 * int(settings.memory_lists.sum()) * settings.num_kept_tokens,
            "forward_references_per_second": count / least["forward"],
            "build_references_per_second": count / least["whole"],
            "build_share_of_forward": least["forward"] / least["whole"]} | figures


def forward(job: "BankJob", ids: np.ndarray) -> None:
    """The bare pass of a group: the build's batches and layers, and nothing is kept."""
    from megatron_m3.memory.encode import EncodePlan, run_encoding

    class BarePlan(EncodePlan):
        def keep(self, *parts: object) -> None:
            pass

    import torch

    loaded, (tokens, lengths) = job.loaded, job.references.tokens(ids)
    order = np.argsort(lengths, kind="stable")
    while len(order):
        longest = int(lengths[order[-1]])
        count = max(1, job.options.batch_tokens // (len(loaded.prefix_ids) + longest))
        order, rows = order[:-count], order[-count:]
        plan = BarePlan([loaded.config], len(loaded.prefix_ids), torch.from_numpy(lengths[rows]))
        run_encoding(loaded, torch.from_numpy(tokens[rows, :longest]).long(), plan)


def bench_growth(folder: Path, counts: list[int]) -> dict[str, float]:
    """CPU milliseconds of a reference more, and peak resident MiB, as the number of references grows; a tiny model."""
    from tests.bank_jobs import make_inputs

    make_inputs(folder)
    figures: dict[str, float] = {}
    before = (0, 0.0)
    for count in counts:
        make_random_references(folder / str(count), folder / "references", count, 16)
        [(peak, seconds)] = run_job(1, checkpoint=folder / "run", references=folder / str(count),
                                    output=folder / f"bank_{count}", codec="KLT20")
        more = 1000 * (seconds - before[1]) / (count - before[0])
        figures |= {f"peak_mib_{count}": peak, f"cpu_seconds_{count}": seconds}
        figures |= {f"ms_per_reference_from_{before[0]}_to_{count}": more} if before[0] else {}
        before = (count, seconds)
    return figures


def main() -> None:
    """Print the figures as JSON."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, default in (("checkpoint", Path, None), ("references", Path, None), ("count", int, 512),
                                ("codec", str, "auto"), ("growth", str, "")):
        parser.add_argument(f"--{name}", type=kind, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    select()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.growth:
            figures = bench_growth(folder, list(map(int, options.growth.split(","))))
        elif options.checkpoint:
            figures = bench_build(folder, options.checkpoint, options.references, options.count, options.codec)
        else:
            make_artifacts(folder)
            run, references = folder / "run", folder / str(NUM_REFERENCES)
            figures = bench_build(folder, run, references, options.count, options.codec)
            figures |= bench_peak_memory(folder) | bench_ranks(folder, run, references)
    rounded = {name: round(one, 3) if isinstance(one, float) else one for name, one in figures.items()}
    print(json.dumps(rounded, indent=2))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
