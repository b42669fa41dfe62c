"""Rows of ``results.csv``: times measured on a card, each with its device, versions and date."""

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
