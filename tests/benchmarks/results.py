"""Rows of ``results.csv``: times measured on a card, each with its device, versions and date.

    python -m tests.benchmarks.results            # all runs as tables
    python -m tests.benchmarks.results --write    # the newest of each benchmark and device, into docs/results.md

In the document a line ``<!-- times: BENCHMARK -->`` begins what is made from the rows, ``<!-- end -->`` ends it.
"""

import csv
import datetime
import importlib.metadata
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

FILE = Path(__file__).with_name("results.csv")
DOCUMENT = FILE.parents[2] / "docs/results.md"
COLUMNS = ("date", "device", "torch", "triton", "cudnn", "te", "benchmark", "shape", "batch", "tokens", "what", "pass",
           "p20_ms", "p50_ms", "p80_ms", "ratio")
"""Times at 20, 50 and 80 %; ``ratio`` is that of the middle one to the benchmark's floor; te is Transformer Engine."""
RUN = COLUMNS[:7]
"""What rows of one run have in common."""
PLACE = re.compile(r"(<!-- times: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NONE = "No row yet: `make gpu-check` on a machine with a CUDA card measures it."

type Row = Mapping[str, str]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def dry_run() -> bool:
    """Whether ``--dry`` asks to go the same way on any machine; ends the process where neither that nor a card is."""
    dry = "--dry" in sys.argv
    if not dry and not torch.cuda.is_available():
        print("this is timed on a CUDA device; there is none (--dry goes the same way without one)")
        sys.exit()
    if dry and "--record" in sys.argv:
        sys.exit("error: --dry has nothing to record")
    return dry


def spread(times: "torch.Tensor | Sequence[float]") -> tuple[float, float, float]:
    """Times at 20, 50 and 80 %."""
    low, middle, high = torch.as_tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return low, middle, high


def append(benchmark: str, rows: Iterable[Mapping[str, object]], path: Path = FILE) -> None:
    """Add rows measured now on this machine's card to the file."""
    here = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(), "device": torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": _version("triton"), "cudnn": torch.backends.cudnn.version(),
        "te": _version("transformer-engine"), "benchmark": benchmark,
    }
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(here | dict(row) for row in rows)


def report(benchmark: str, rows: Sequence[Mapping[str, object]], limits: Mapping[tuple[object, object], float]) -> bool:
    """Print rows, add them to the file if the command line says ``--record``, and tell whether all limits are met.

    ``limits`` are largest ratios, by pass and what; one that has no row is not met.
    """
    if "--record" in sys.argv:
        append(benchmark, rows)
    missing = set(limits) - {(row["pass"], row["what"]) for row in rows}
    for direction, what in missing:
        print(f"{what} {direction}: not measured   MISSED")
    met = not missing
    for row in rows:
        text = (f"{row['shape']} x {row['batch']:<3} {row['what']:<18} {row['pass']:<20} p20 {row['p20_ms']:10.4f}  "
                f"p50 {row['p50_ms']:10.4f}  p80 {row['p80_ms']:10.4f} ms   ratio {row['ratio']:7.3f}")
        limit = limits.get((row["pass"], row["what"]))
        if limit is not None:
            met &= float(str(row["ratio"])) <= limit
            text += f"   limit {limit:.3f}   {'met' if float(str(row['ratio'])) <= limit else 'MISSED'}"
        print(text, flush=True)
    return met


def read(path: Path = FILE) -> list[dict[str, str]]:
    """All rows."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def runs_of(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each run, oldest first."""
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        runs.setdefault(tuple(row[name] for name in RUN), []).append(row)
    return sorted(runs.values(), key=lambda run: run[0]["date"])


def table(rows: Sequence[Row]) -> str:
    """The rows of one run as a Markdown table: middle times in ms, and ratios to the floor."""
    found_at = {(row["shape"], row["batch"], row["tokens"], row["pass"], row["what"]): row for row in rows}
    columns, last = list(dict.fromkeys(row["what"] for row in rows)), rows[-1]
    names = {"torch": "torch", "triton": "Triton", "cudnn": "cuDNN", "te": "Transformer Engine"}
    versions = [f"{name} {last[column]}" for column, name in names.items() if last[column]]
    lines = [f"{last['device']}, {', '.join(versions)}, {last['date']}:", "",
             f"| shape | pass | {' | '.join(columns)} |", f"|---|---|{'---:|' * len(columns)}"]
    for shape, batch, tokens, direction in dict.fromkeys(key[:4] for key in found_at):
        found = [found_at.get((shape, batch, tokens, direction, column)) for column in columns]
        cells = [f"{float(row['p50_ms']):.3f} ({float(row['ratio']):.2f})" if row else "" for row in found]
        lines.append(f"| {shape}, {batch} x {tokens} | {direction} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fill(document: str, rows: Iterable[Row]) -> str:
    """The document with a table of the newest run on each device in every place that names its benchmark.

    Raises:
        ValueError: a benchmark of the rows has no place.
    """
    newest: dict[str, dict[str, list[Row]]] = {}
    for run in runs_of(rows):
        newest.setdefault(run[0]["benchmark"], {})[run[0]["device"]] = run
    missing = set(newest) - {place[2] for place in PLACE.finditer(document)}
    if missing:
        raise ValueError(f"docs/results.md has no line <!-- times: {min(missing)} -->")

    def made(place: re.Match[str]) -> str:
        tables = [table(run) for run in newest.get(place[2], {}).values()]
        return f"{place[1]}{'\n\n'.join(tables) or NONE}\n{place[3]}"

    return PLACE.sub(made, document)


def main() -> None:
    """Print a table for each run, or write the newest into the document."""
    rows = read()
    if "--write" in sys.argv:
        DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8"), rows), encoding="utf-8")
        return
    for run in runs_of(rows):
        print(f"{run[0]['benchmark']}: {table(run)}", end="\n\n")


if __name__ == "__main__":
    main()
