"""A picture of loss against bytes per reference, one colour for each checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from megatron_m3.evaluation.frontier import PointResult
from megatron_m3.manifest import atomic_path

COLOURS = ("#2f6fb7", "#d9702b", "#2a9d62", "#8e5bb5", "#b33a3a", "#6b6b6b")


def plot_frontier(path: Path, results: Sequence[PointResult], title: str) -> None:
    """Write a PNG: bytes of keys and values on a log axis; none and text are lines, shuffled points are crosses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.5), dpi=144, layout="constrained")
    axes = figure.subplots()
    for colour, label in zip(COLOURS * len(results), dict.fromkeys(one.checkpoint for one in results), strict=False):
        mine = [one for one in results if one.checkpoint == label]
        for one in mine:
            if one.mode in ("none", "text"):
                style = ":" if one.mode == "none" else "--"
                axes.axhline(one.nats_per_token, color=colour, linestyle=style, linewidth=1,
                             label=f"{label}: {'no memory' if one.mode == 'none' else 'as text'}")
        for mode, marker in (("explicit", "o"), ("shuffled", "x")):
            points = [one for one in mine if one.mode == mode]
            sizes, losses = [one.key_value_bytes or 0 for one in points], [one.nats_per_token for one in points]
            if points:
                axes.plot(sizes, losses, marker, color=colour, markersize=5, label=f"{label}: {mode}")
        axes.plot(*_lower_edge(mine), color=colour, linewidth=1, alpha=0.6, drawstyle="steps-post")
    axes.set(xscale="log", xlabel="bytes of keys and values of a reference", ylabel="nats per target token",
             title=title)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _lower_edge(results: Sequence[PointResult]) -> tuple[list[int], list[float]]:
    """Explicit points that no point of as few bytes beats, by bytes."""
    points = sorted((one.key_value_bytes or 0, one.nats_per_token) for one in results if one.mode == "explicit")
    best: list[tuple[int, float]] = []
    for size, loss in points:
        if not best or loss < best[-1][1]:
            best.append((size, loss))
    return [size for size, _ in best], [loss for _, loss in best]
