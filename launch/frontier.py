"""`m3 memory frontier`: loss against bytes per reference for many memory settings, of one or more checkpoints.

    m3 memory frontier --checkpoints before=smollm2,after=run --input heldout.jsonl --output frontier.jsonl \\
        --plot frontier.png --points "none text layers=8-24,tokens=all layers=8-24,tokens=8 \\
        layers=8-24,tokens=8,codec=OPQ16_64,PQ16x8 layers=8-24,tokens=8,mode=shuffled"

Each point is none, text, or fields of the config's memory section with codec= and mode=shuffled besides. Losses are
added to the output as they come; a run that was interrupted goes on where it stopped.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, exit_on_user_error

if TYPE_CHECKING:
    from megatron_m3.evaluation.frontier import PointResult


@dataclass(frozen=True, kw_only=True)
class FrontierOptions:
    """Which checkpoints, which points, which lines."""

    checkpoints: tuple[str, ...]
    """Checkpoints, or folders of runs, each as NAME=PATH."""
    input: str
    """JSONL file: {"id", "context", "target", "references": [...]} a line, as for m3 score."""
    output: str
    """JSONL file to which losses are added."""
    points: str
    """Points, separated by blanks."""
    plot: str = ""
    """PNG file to write; none by default."""
    calibration: str = ""
    """JSONL file with the references that codecs are trained on; by default the input's own."""
    lines: int = 0
    """Score the first lines only; 0 scores all."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Numbers to compute with; by default each checkpoint's."""
    seed: int = 1234
    """Which other line's references mode=shuffled takes, and the codec's sample."""
    json: bool = False
    """Print the table as JSON."""

    def __post_init__(self) -> None:
        named = [entry.partition("=") for entry in self.checkpoints]
        if not named or not all(name and path for name, _, path in named):
            raise ConfigError(f"checkpoints={','.join(self.checkpoints)}: give each as NAME=PATH")
        if len({name for name, _, _ in named}) < len(named):
            raise ConfigError(f"checkpoints={','.join(self.checkpoints)}: a name is given twice")
        if not self.points.split():
            raise ConfigError("points: none are given; write settings such as layers=8-24,tokens=8")
        for name in ("lines", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 0 or more")


def main(argv: Sequence[str] | None = None) -> None:
    """Score every point, write the picture, print the table."""
    options = parse(FrontierOptions, argv, "m3 memory frontier", __doc__ or "")
    results = [result for entry in options.checkpoints for result in score_points(options, *entry.split("=", 1))]
    if options.plot:
        from megatron_m3.evaluation.frontier_plot import plot_frontier

        plot_frontier(Path(options.plot), results, f"{Path(options.input).stem}, {results[0].lines} lines")
    if options.json:
        json.dump([asdict(result) for result in results], sys.stdout, indent=2)
        print()
    else:
        print("\n".join(table(results)))


def score_points(options: FrontierOptions, label: str, checkpoint: str) -> list["PointResult"]:
    """Score what the output lacks of one checkpoint; the results of all its points."""
    from megatron_m3.platform import select

    select()
    from megatron_m3.evaluation.frontier import Frontier, Point, ResultFile, collect
    from megatron_m3.model.checkpoint import load_model
    from megatron_m3.platform.progress import Progress

    points = list(dict.fromkeys(Point.parse(text) for text in options.points.split()))
    results = ResultFile(Path(options.output))
    frontier = Frontier.open(load_model(Path(checkpoint), dtype=options.dtype), points, Path(options.input),
                             Path(options.calibration or options.input), lines=options.lines, seed=options.seed,
                             label=label)
    total = sum(len(block) * len(lacking) for block, lacking in frontier.missing(results))
    with Progress(label, total, "lines", enabled=total > 0) as progress:
        frontier.run(results, progress.advance)
    return collect(frontier, results)


def table(results: Sequence["PointResult"]) -> list[str]:
    """The results for people."""
    wide = max(len(result.point) for result in results)
    name = max(len("checkpoint"), *(len(result.checkpoint) for result in results))
    head = f"{'checkpoint':<{name}}  {'point':<{wide}}  {'K and V':>9}  {'record':>9}  nats per token"
    lines = [head]
    for one in results:
        sizes = ["-" if size is None else f"{size:,}" for size in (one.key_value_bytes, one.record_bytes)]
        lines.append(f"{one.checkpoint:<{name}}  {one.point:<{wide}}  {sizes[0]:>9}  {sizes[1]:>9}  "
                     f"{one.nats_per_token:.4f} ± {one.standard_error:.4f}")
    return lines


if __name__ == "__main__":
    exit_on_user_error(main)
