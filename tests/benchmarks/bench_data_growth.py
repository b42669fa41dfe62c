"""How CPU time, memory and disk of the data steps grow with the number of documents, as JSON lines and as a picture.

    python -m tests.benchmarks.bench_data_growth --folder F --documents 10000 100000 1000000 \
        --steps collect,filter,deduplicate --rows data_growth.jsonl --plot docs/data-growth.png

Each step is the job `m3 data STEP` in a process of its own, from nothing to its output in F/DOCUMENTS/STEP; its row is
added when it ends. Steps with a row are left out, so the same command goes on where a long run was stopped. A step
needs the outputs of those before it, and makes them again where they were removed. The documents are short texts of
WordNet entries, a tenth of which repeat an earlier one wholly, a tenth but for a word.

A search costs each document more, the more references there are, so neighbours are those of the corpus' first block,
some twenty thousand documents, in the index of all.
"""

import argparse
import datetime
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.wordnet import CORPUS, load_entries
from megatron_m3.manifest import atomic_path

ROWS = Path(__file__).with_name("data_growth.jsonl")
ENTRIES = 7
"""Entries in a document: some 100 words."""
POLL_SECONDS = 0.5
"""Between looks at how much of the disk a job takes."""
FIRST_BLOCK = "block_000000.parquet"
STEPS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "collect": ({"input": "raw.jsonl"}, ("--block-megabytes", "16")),
    "filter": ({"input": "collect"}, ()),
    "deduplicate": ({"input": "filter"}, ("--part-entries", str(1 << 20))),
    "tokenizer": ({"input": "deduplicate"}, ()),
    "tokenize": ({"input": "deduplicate", "tokenizer": "tokenizer"}, ()),
    "references": ({"input": "deduplicate", "tokenizer": "tokenizer"}, ()),
    "embed": ({"references": "references"}, ("--size", "256")),
    "index": ({"references": "references", "embeddings": "embed"}, ()),
    "part": ({"input": f"deduplicate/{FIRST_BLOCK}", "tokenizer": "tokenizer"}, ()),
    "neighbours": ({"tokens": "part", "tokenizer": "tokenizer", "references": "references", "index": "index"}, ()),
}
"""The steps in order: the options that name outputs of steps before, and further options.

Blocks and parts are small, so that there are several of them long before a million documents.
"""
JOBS = {"part": "tokenize"}
"""The jobs of steps that are not called as their job is."""
COLOURS = ("#2f6fb7", "#d9702b", "#2a9d62", "#8e5bb5", "#b33a3a", "#6b6b6b", "#c9a227", "#1f9e9e", "#d65f9c")


class Texts:
    """Documents by their number, the same whatever is asked for before."""

    def __init__(self) -> None:
        self.entries = [f"{entry.opening} {entry.gloss}." for entry in load_entries(CORPUS, 160)]

    def __getitem__(self, number: int) -> str:
        rng = random.Random(number)
        kind = rng.random()
        if not number or kind >= 0.2:
            return " ".join(rng.choices(self.entries, k=ENTRIES))
        text = self[rng.randrange(number)]
        return text if kind < 0.1 else text.replace(" means ", f" n{number} ", 1)


def write_raw(path: Path, count: int) -> None:
    """``count`` documents as JSON lines."""
    texts = Texts()
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for number in range(count):
            stream.write(json.dumps({"id": f"d{number}", "text": texts[number]}) + "\n")


def disk_bytes(folder: Path) -> int:
    """Bytes of all files of a folder, some of which may vanish meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue
    return total


class DiskWatch(threading.Thread):
    """Looks how many bytes a folder holds at most, as long as the context lasts."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.most, self.ended = folder, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(POLL_SECONDS):
            self.most = max(self.most, disk_bytes(self.folder))

    def __enter__(self) -> "DiskWatch":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.join()
        self.most = max(self.most, disk_bytes(self.folder))


def measure(step: str, options: Sequence[str], output: Path) -> dict[str, float]:
    """CPU seconds, seconds, largest memory and most disk of a job; a small process starts it, to count it alone.

    Raises:
        SystemExit: the job fails; what it said is shown.
    """
    watch = ("import resource, subprocess, sys; code = subprocess.run(sys.argv[1:], stdout=2).returncode;"
             "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used[0] + used[1], used[2]); sys.exit(code)")
    job = ["-m", "launch.m3", "data", step, *options]
    begin = time.monotonic()
    with DiskWatch(output) as disk:
        done = subprocess.run([sys.executable, "-c", watch, sys.executable, *job], capture_output=True, text=True,
                              check=False)
    if done.returncode:
        sys.exit(f"m3 data {step} {' '.join(options)}: ended with {done.returncode}\n{done.stderr[-3000:]}")
    seconds, kilobytes = done.stdout.split()
    return {"cpu_seconds": round(float(seconds), 2), "seconds": round(time.monotonic() - begin, 1),
            "peak_mib": round(int(kilobytes) / 1024, 1), "disk_mib": round(disk.most / 2**20, 1)}


def run_step(step: str, folder: Path) -> dict[str, float]:
    """A step from nothing; what is left of one that was stopped is removed."""
    sources, more = STEPS[step]
    shutil.rmtree(folder / step, ignore_errors=True)
    options = [text for name, source in sources.items() for text in (f"--{name}", str(folder / source))]
    row = measure(JOBS.get(step, step), [*options, "--output", str(folder / step), *more], folder / step)
    if step == "neighbours":
        row["searched"] = json.loads((folder / "part" / "manifest.json").read_text())["info"]["documents"]
    return row


def make_sources(step: str, folder: Path, count: int) -> None:
    """See that what a step reads is there."""
    for source in STEPS[step][0].values():
        if source == "raw.jsonl":
            if not (folder / source).exists():
                write_raw(folder / source, count)
        elif not (folder / (before := source.removesuffix(f"/{FIRST_BLOCK}")) / "manifest.json").exists():
            make_sources(before, folder, count)
            run_step(before, folder)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; none where it is not there."""
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def grow(steps: Sequence[str], count: int, folder: Path, rows: Path) -> None:
    """Add the rows that are missing for ``count`` documents."""
    have = {(row["step"], row["documents"]) for row in read_rows(rows)}
    for step in steps:
        if (step, count) in have:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        make_sources(step, folder, count)
        row = {"date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(), "step": step, "documents": count}
        row |= run_step(step, folder)
        with rows.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print(line_of(row), flush=True)


def cost_of(row: dict[str, Any]) -> float:
    """CPU milliseconds of a document that the step looks at."""
    return float(1000 * row["cpu_seconds"] / row.get("searched", row["documents"]))


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    return (f"{row['step']:<14}{row['documents']:>11,}{row['cpu_seconds']:>10,.1f}{cost_of(row):>10.3f}"
            f"{row['peak_mib']:>10,.0f}{row['disk_mib']:>10,.0f}")


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: CPU milliseconds a document and peak MiB of each step against the number of documents."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(10.5, 4.4), dpi=144, layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    steps = [step for step in STEPS if any(row["step"] == step for row in rows)]
    for colour, step in zip(COLOURS, steps, strict=False):
        mine = sorted((row for row in rows if row["step"] == step), key=lambda row: row["documents"])
        counts = [row["documents"] for row in mine]
        time_axes.plot(counts, [cost_of(row) for row in mine], "o-", color=colour, markersize=4, label=step)
        memory_axes.plot(counts, [row["peak_mib"] for row in mine], "o-", color=colour, markersize=4, label=step)
    for axes, title in ((time_axes, "CPU milliseconds a document"), (memory_axes, "largest resident memory, MiB")):
        axes.set(xscale="log", xlabel="documents", title=title)
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    time_axes.set_yscale("log", subs=())
    time_axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    time_axes.yaxis.set_major_formatter("{x:g}")
    memory_axes.set_ylim(bottom=0)
    memory_axes.legend(fontsize=8, frameon=False, loc="upper left")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def main() -> None:
    """Measure what is missing, print all rows asked for, draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where inputs and outputs lie; without it nothing is run")
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--steps", default="collect,filter,deduplicate", help=f"of {','.join(STEPS)}")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--plot", type=Path, help="draw all rows as a PNG")
    options = parser.parse_args()
    steps = options.steps.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"--steps: no {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    print(f"{'step':<14}{'documents':>11}{'CPU s':>10}{'CPU ms':>10}{'peak MiB':>10}{'disk MiB':>10}")
    for row in read_rows(options.rows):
        print(line_of(row), flush=True)
    if options.folder:
        for count in options.documents:
            grow([step for step in STEPS if step in steps], count, options.folder / str(count), options.rows)
    if options.plot:
        plot(list(read_rows(options.rows)), options.plot)


if __name__ == "__main__":
    main()
