"""Figure 1.1: the total cost of a piece of knowledge by how often it is used, as a PNG."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_m3.evaluation.cost import TFLOP, KnowledgeCost
from megatron_m3.manifest import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (
    ("parameters (lower bound)", "#2f6fb7"),
    ("explicit memory", "#2a9d62"),
    ("text in context (RAG)", "#d9702b"),
)


def usage_range(cost: KnowledgeCost) -> tuple[float, float]:
    """Usage counts that the figure spans: two decades beyond either end of the advantage interval."""
    crossings = [end for end in cost.interval if 0 < end < float("inf")] or [1.0]
    return min(crossings) / 100, max(crossings) * 100


def plot_cost(path: Path, name: str, cost: KnowledgeCost) -> None:
    """Write the figure for the model called ``name`` to ``path``, atomically."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    uses = np.geomspace(*usage_range(cost), 500)
    curves = np.array([cost.totals(count) for count in uses]).T / TFLOP
    lowest, best = curves.min(axis=0), curves.argmin(axis=0)
    floor, ceiling = lowest.min() / 2, curves[0].max() * 20

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for index, (label, colour) in enumerate(FORMATS):
        axes.fill_between(uses, floor, lowest, where=best == index, color=colour, alpha=0.15, linewidth=0)
        axes.loglog(uses, curves[index], color=colour, linewidth=2)
        column = int(np.searchsorted(curves[index], ceiling / 4)) if index == 2 else len(uses) // (50, 3)[index]
        offset = (12, -4) if index == 2 else (0, 8)
        axes.annotate(label, (uses[column], curves[index, column]), offset, textcoords="offset points", color=colour)
    low, high = cost.interval
    if low < high:
        _mark_interval(axes, cost, floor)
    axes.set(xlim=(uses[0], uses[-1]), ylim=(floor, ceiling), xlabel="expected usage count",
             ylabel="total cost of writing and reading (TFLOP)",
             title=f"Cost of a piece of knowledge in each format, {name}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)


def _mark_interval(axes: "Axes", cost: KnowledgeCost, floor: float) -> None:
    """Vertical lines at both ends of the advantage interval, with their values."""
    colour, (low, high) = FORMATS[1][1], cost.interval
    for end, side in ((low, "left"), (high, "right")):
        axes.vlines(end, floor, min(cost.totals(end)) / TFLOP, color=colour, linestyle=(0, (2, 3)), linewidth=1.2)
        axes.annotate(f"{end:.3g}" if end < 1000 else f"{end:,.0f}", (end, floor), (4 if side == "left" else -4, 8),
                      textcoords="offset points", ha=side, color=colour)
    axes.annotate("explicit memory is cheapest", ((low * high) ** 0.5, floor), (0, 8), textcoords="offset points",
                  ha="center", color=colour)
