"""What a run tells about itself: the step line, metrics.jsonl, TensorBoard."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_m3.manifest import atomic_path
from megatron_m3.platform.progress import format_seconds

if TYPE_CHECKING:
    import torch

NAME = "metrics.jsonl"


def format_count(number: float) -> str:
    """A rate in three digits: 12.3k, 4.56M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def step_line(record: dict[str, Any]) -> str:
    """One step as a line for people, from the record that goes to metrics.jsonl."""
    share = 100 * record["step"] / record["steps"]
    shares = "".join(f"{name} {100 * record[name]:.0f}% | " for name in ("repeats", "reused") if name in record)
    return (
        f"step {record['step']}/{record['steps']} {share:3.0f}% | loss {record['loss']:.4f} | "
        f"grad norm {record['grad_norm']:.3f} | rate {record['lr']:.2e} | "
        f"{shares}{format_count(record['tokens_per_second'])} tokens/s | MFU {100 * record['mfu']:.1f}% | "
        f"{format_seconds(record['seconds_left'])} left"
    )


PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "H800": 989,
         "A100": 312, "A800": 312, "B200": 2250, "B100": 1750}
"""TFLOP/s of cards in dense bf16 products, as their maker says; the first of which a card has all words counts."""


def peak_tflops(device: "torch.device", dtype: "torch.dtype") -> float:
    """What MFU is a share of: the maker's figure for a known card in bf16, else what a large product reaches."""
    import torch

    if device.type == "cuda" and dtype == torch.bfloat16:
        known = known_peak(torch.cuda.get_device_name(device))
        if known:
            return known
    return measure_peak_tflops(device, dtype)


def known_peak(card: str) -> float | None:
    """TFLOP/s in :data:`PEAKS` of a card that calls itself ``card``; None where it is not there."""
    words = set(card.replace("-", " ").split())
    return next((float(peak) for name, peak in PEAKS.items() if words.issuperset(name.split())), None)


def measure_peak_tflops(device: "torch.device", dtype: "torch.dtype", seconds: float = 0.3) -> float:
    """TFLOP/s that one process reaches in a large matrix product."""
    import torch

    size = 8192 if device.type == "cuda" else 768
    left = torch.ones(size, size, device=device, dtype=dtype)

    def product() -> None:
        torch.mm(left, left)
        if device.type == "cuda":
            torch.cuda.synchronize()

    product()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        product()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start) / 1e12


class Metrics:
    """Writes the records of a run; used on one process only.

    A run that goes on from step ``step`` first drops the records of later steps, so every step stands there once.
    """

    def __init__(self, folder: Path, *, every: int, tensorboard: bool) -> None:
        self.path, self.every, self.tensorboard = Path(folder) / NAME, every, tensorboard
        self.writer: Any = None

    def begin(self, step: int) -> None:
        """Start after step ``step``, at the start of the run or after a return to a checkpoint."""
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(kept))
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.close()
            self.writer = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step + 1)

    def step(self, record: dict[str, Any]) -> None:
        """Record one step, and print its line if it is time."""
        self.write(record)
        if self.writer is not None:
            for name in ("loss", "grad_norm", "lr", "tokens_per_second", "mfu"):
                self.writer.add_scalar(name, record[name], record["step"])
        if record["step"] % self.every == 0 or record["step"] == record["steps"]:
            say(step_line(record))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record to metrics.jsonl."""
        with self.path.open("a") as stream:
            stream.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Flush and close the TensorBoard events."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def _step_of(line: str) -> float:
    """The step of a metrics line; a line cut off by a crash counts as later than all."""
    try:
        record = json.loads(line)
    except ValueError:
        return float("inf")
    return 0 if "event" in record else float(record["step"])


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)
