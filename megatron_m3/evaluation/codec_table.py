"""Rate and distortion of codecs on one set of lines: bytes of a vector, errors, loss, and what of it is the codec's."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_m3.evaluation.codec_errors import CodecErrors, measure_errors
from megatron_m3.evaluation.frontier import Frontier, Point, ResultFile, collect, per_token
from megatron_m3.memory import Codec
from megatron_m3.platform.progress import Progress


@dataclass(frozen=True, kw_only=True)
class CodecResult:
    """What one codec takes and costs; errors as in :class:`CodecErrors`."""

    codec: str
    vector_bytes: float
    """Half of the bytes of a key and value together."""
    keys: float
    values: float
    outputs: float
    lines: int
    nats_per_token: float
    standard_error: float
    cost: float | None
    """Nats per token above exact memories on the same lines; None for the codec none."""
    cost_error: float | None
    """Its standard error over draws of lines."""


def measure_codecs(frontier: Frontier, results: ResultFile, error_lines: int) -> list[CodecResult]:
    """Measure what ``results`` lacks of the points of ``frontier``; one result a point, fewest bytes first.

    Args:
        frontier: its points differ in their codecs alone; the first one's is none.
        results: file of what has been measured.
        error_lines: lines on which errors are measured.
    """
    total = sum(len(block) * len(lacking) for block, lacking in frontier.missing(results))
    with Progress("losses", total, "lines", enabled=total > 0) as progress:
        frontier.run(results, progress.advance)
    error_lines = min(error_lines, len(frontier.examples["explicit"]))
    _measure_errors(frontier, results, error_lines)
    exact, *others = frontier.points
    found = []
    for point, loss in zip(frontier.points, collect(frontier, results), strict=True):
        row = results.rows[_error_key(frontier, point, error_lines)]
        cost, cost_error = _cost(frontier, results, point, exact) if point in others else (None, None)
        found.append(CodecResult(
            codec=row["codec"], vector_bytes=row["token_bytes"] / 2, **row["errors"], lines=loss.lines,
            nats_per_token=loss.nats_per_token, standard_error=loss.standard_error, cost=cost, cost_error=cost_error,
        ))
    return sorted(found, key=lambda one: one.vector_bytes)


def _error_key(frontier: Frontier, point: Point, error_lines: int) -> str:
    return f"{frontier.key(point, range(error_lines))} errors"


def _measure_errors(frontier: Frontier, results: ResultFile, lines: int) -> None:
    """Add the errors that are missing, all in one pass over the lines."""
    missing = [point for point in frontier.points if _error_key(frontier, point, lines) not in results.rows]
    if not missing:
        return
    codecs = [frontier.codec(point) for point in missing]
    lossy = [codec for codec in codecs if codec is not None]
    with Progress("errors", lines, "lines") as progress:
        examples = frontier.examples["explicit"][:lines]
        errors = iter(measure_errors(frontier.scorers[frontier.points[0]], lossy, examples, progress.advance))
    for point, codec in zip(missing, codecs, strict=True):
        found = CodecErrors(keys=0.0, values=0.0, outputs=0.0) if codec is None else next(errors)
        results.add({"key": _error_key(frontier, point, lines), "codec": codec.name if codec else "none",
                     "token_bytes": _token_bytes(frontier, codec), "errors": asdict(found)})


def _token_bytes(frontier: Frontier, codec: Codec | None) -> int:
    """Bytes of a key and value; those of the codec none are bf16 numbers, as a trained model's bank has them."""
    return codec.token_bytes if codec else 2 * 2 * frontier.loaded.config.model.head_size


def _cost(frontier: Frontier, results: ResultFile, point: Point, exact: Point) -> tuple[float, float]:
    """The loss of ``point`` less that of ``exact``, line by line, a token, and its standard error."""
    rows: Sequence[tuple[dict[str, Any], dict[str, Any]]] = [
        (results.rows[frontier.key(point, block)], results.rows[frontier.key(exact, block)])
        for block in frontier.blocks()
    ]
    more = [one - other for row, base in rows for one, other in zip(row["nll"], base["nll"], strict=True)]
    tokens = [count for row, _ in rows for count in row["tokens"]]
    return per_token(more, tokens)
