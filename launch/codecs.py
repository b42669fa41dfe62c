"""`m3 memory codecs`: what codecs cost, in errors and in loss, against the bytes of a key or value.

    m3 memory codecs --checkpoint run --input heldout_long.jsonl --calibration calibration_long.jsonl \\
        --output codecs.jsonl --plot codecs.png --codecs "none fp8 PQ16x8 OPQ16_64,PQ16x8 KLT28 KLT40"
    m3 memory codecs --checkpoint smollm2 --memory layers=8-24,tokens=all --input heldout_short.jsonl …

Every codec is trained on the memories of the calibration lines' references. Squared errors are shares: of keys, of
values, and of what attention makes of them, all on the first --error-lines; the cost is the loss less that of exact
memories on the same lines. Results are added to the output as they come; an interrupted run goes on where it stopped.
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
    from megatron_m3.evaluation.codec_table import CodecResult
    from megatron_m3.evaluation.frontier import Point


@dataclass(frozen=True, kw_only=True)
class CodecsOptions:
    """Which codecs, which model, which lines."""

    checkpoint: str
    """Checkpoint, or the folder of a run, whose newest one is taken."""
    input: str
    """JSONL file: {"id", "context", "target", "references": [...]} a line, as for m3 score."""
    calibration: str
    """JSONL file with the references that codecs are trained on; other ones than the input's, for honest figures."""
    output: str
    """JSONL file to which results are added."""
    codecs: str
    """Codecs, separated by blanks: none, fp8, KLT and a number, FAISS factory strings."""
    memory: str = ""
    """Fields of the config's memory section instead of the checkpoint's, such as layers=8-24,tokens=all."""
    plot: str = ""
    """PNG file to write; none by default."""
    lines: int = 0
    """Score the first lines only; 0 scores all."""
    error_lines: int = 50
    """Lines on which errors are measured, at most."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Numbers to compute with; by default the checkpoint's."""
    seed: int = 1234
    """Draw of the codecs' sample."""
    json: bool = False
    """Print the table as JSON."""

    def __post_init__(self) -> None:
        if not self.codecs.split():
            raise ConfigError('codecs: none are given; write "none PQ16x8 KLT40"')
        for name, least in (("lines", 0), ("error_lines", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every codec, write the picture, print the table."""
    options = parse(CodecsOptions, argv, "m3 memory codecs", __doc__ or "")
    results = measure(options)
    if options.plot:
        from megatron_m3.evaluation.codec_plot import plot_codecs

        plot_codecs(Path(options.plot), results, f"{Path(options.input).stem}, {results[0].lines} lines")
    if options.json:
        json.dump([asdict(one) for one in results], sys.stdout, indent=2)
        print()
    else:
        print("\n".join(table(results)))


def measure(options: CodecsOptions) -> list["CodecResult"]:
    """Measure what the output lacks; the results of all codecs, by bytes."""
    from megatron_m3.platform import select

    select()
    from megatron_m3.evaluation.codec_table import measure_codecs
    from megatron_m3.evaluation.frontier import Frontier, ResultFile
    from megatron_m3.model.checkpoint import load_model

    points = [_point(options.memory, codec) for codec in dict.fromkeys(["none", *options.codecs.split()])]
    frontier = Frontier.open(load_model(Path(options.checkpoint), dtype=options.dtype), points, Path(options.input),
                             Path(options.calibration), lines=options.lines, seed=options.seed,
                             label=Path(options.checkpoint).name)
    return measure_codecs(frontier, ResultFile(Path(options.output)), options.error_lines)


def _point(memory: str, codec: str) -> "Point":
    from megatron_m3.evaluation.frontier import Point

    return Point(mode="explicit", codec=codec, memory=Point.parse(memory).memory if memory else ())


def table(results: Sequence["CodecResult"]) -> list[str]:
    """The results for people."""
    wide = max(len("codec"), *(len(one.codec) for one in results))
    lines = [f"{'codec':<{wide}}  bytes a vector    keys  values  outputs  nats per token             cost"]
    for one in results:
        cost = f"{one.cost:.4f} ± {one.cost_error:.4f}" if one.cost is not None else "-"
        errors = f"{one.keys:.4f}  {one.values:.4f}   {one.outputs:.4f}"
        lines.append(f"{one.codec:<{wide}}  {one.vector_bytes:>14g}  {errors}          {one.nats_per_token:.4f}  "
                     f"{cost:>15}")
    return lines


if __name__ == "__main__":
    exit_on_user_error(main)
