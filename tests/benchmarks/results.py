"""Rows of ``results.csv``: times measured on a card, each with its device, versions and date.

    python -m tests.benchmarks.results    # the times as tables
"""

import csv
import datetime
import importlib.metadata
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

FILE = Path(__file__).with_name("results.csv")
COLUMNS = ("date", "device", "torch", "triton", "benchmark", "shape", "batch", "tokens", "what", "pass",
           "p20_ms", "p50_ms", "p80_ms", "ratio")
"""Times at 20, 50 and 80 %; ``ratio`` is that of the middle one to the benchmark's floor."""


def append(benchmark: str, rows: Iterable[Mapping[str, object]], path: Path = FILE) -> None:
    """Add rows measured now on this machine's card to the file."""
    here = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(), "device": torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": importlib.metadata.version("triton"), "benchmark": benchmark,
    }
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(here | dict(row) for row in rows)


def table(rows: list[dict[str, str]]) -> str:
    """The rows of one run as a Markdown table: middle times in ms, and ratios to the floor."""
    found_at = {(row["shape"], row["batch"], row["tokens"], row["pass"], row["what"]): row for row in rows}
    columns, last = list(dict.fromkeys(row["what"] for row in rows)), rows[-1]
    head = f"{last['benchmark']}: {last['device']}, torch {last['torch']}, Triton {last['triton']}, {last['date']}"
    lines = [head, "", f"| shape | pass | {' | '.join(columns)} |", f"|---|---|{'---:|' * len(columns)}"]
    for shape, batch, tokens, direction in dict.fromkeys(key[:4] for key in found_at):
        found = [found_at.get((shape, batch, tokens, direction, column)) for column in columns]
        cells = [f"{float(row['p50_ms']):.3f} ({float(row['ratio']):.2f})" if row else "" for row in found]
        lines.append(f"| {shape}, {batch} x {tokens} | {direction} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print a table for each benchmark, device, versions and date."""
    with FILE.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    runs: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        runs.setdefault(tuple(row[name] for name in COLUMNS[:5]), []).append(row)
    for run in runs.values():
        print(table(run), end="\n\n")


if __name__ == "__main__":
    main()
