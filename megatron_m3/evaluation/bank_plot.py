"""A picture of what a bank holds: where kept tokens stand, how long keys and values are, and which tokens they are."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_m3.evaluation.bank_stats import BankStats
from megatron_m3.manifest import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2f6fb7", "#d9702b", "#b9c0c9"
PARTS = ("#2f6fb7", "#6fa3d8", "#b9d3ee", "#d9702b", "#8e5bb5")


def plot_bank(path: Path, stats: BankStats, title: str) -> None:
    """Write a PNG: bytes, places, norms, and, where they are known, kinds of tokens and the tokens kept most often."""
    from matplotlib.figure import Figure

    told = bool(stats.tokens)
    figure = Figure(figsize=(13, 8.4 if told else 5.4), dpi=144, layout="constrained")
    figure.suptitle(f"{title}: {stats.references:,} memories, {stats.bytes / 2**20:,.1f} MiB", fontsize=13)
    rows: Any = figure.subfigures(3 if told else 2, 1, height_ratios=[0.8, 3.4, 3][: 3 if told else 2])
    _bytes(rows[0].subplots(), stats)
    axes = rows[1].subplots(1, 3, width_ratios=[1.6, 1, 1])
    _places(rows[1], axes[0], stats)
    for axis, norms, name in zip(axes[1:], (stats.key_norms, stats.value_norms), ("key", "value"), strict=True):
        _norms(rows[1], axis, stats, norms, name)
    if told:
        kinds, tokens = rows[2].subplots(1, 2, width_ratios=[1, 2])
        _kinds(kinds, stats)
        _tokens(tokens, stats)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _bytes(axis: "Axes", stats: BankStats) -> None:
    left = 0
    for colour, (name, size) in zip(PARTS, stats.parts.items(), strict=True):
        share = size / max(1, stats.bytes)
        if size:
            axis.barh(0, size, left=left, color=colour, label=f"{name} {share:.1%}", height=0.6)
        left += size
    axis.set(xlim=(0, max(1, left)), yticks=[], xticks=[])
    axis.spines[:].set_visible(False)
    axis.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.5, 0.05), frameon=False, fontsize=9)


def _places(figure: Any, axis: "Axes", stats: BankStats) -> None:
    shares = np.array(stats.places)
    image = axis.imshow(shares * shares.shape[1], aspect="auto", origin="lower", cmap="viridis",
                        extent=(0, 1, -0.5, len(shares) - 0.5), interpolation="nearest")
    what = "its reference" if stats.relative_to_length else "the longest reference"
    axis.set(title="where kept tokens stand", xlabel=f"place in {what}, from first to last token")
    _layer_ticks(axis, stats)
    figure.colorbar(image, ax=axis, label="kept there, against evenly", pad=0.02)


def _norms(figure: "Figure | Any", axis: "Axes", stats: BankStats, norms: list[list[float | None]], name: str) -> None:
    values = np.array([[np.nan if norm is None else norm for norm in row] for row in norms], float)
    image = axis.imshow(values, aspect="auto", origin="lower", cmap="magma", interpolation="nearest")
    axis.set(title=f"mean length of a {name}", xlabel="key-value head", xticks=range(values.shape[1]))
    _layer_ticks(axis, stats)
    figure.colorbar(image, ax=axis, pad=0.02)


def _layer_ticks(axis: "Axes", stats: BankStats) -> None:
    step = max(1, len(stats.layers) // 12)
    axis.set_yticks(range(0, len(stats.layers), step), [str(layer) for layer in stats.layers[::step]])
    axis.set_ylabel("memory layer")


def _kinds(axis: "Axes", stats: BankStats) -> None:
    places = np.arange(len(stats.kinds))
    for offset, part, colour, label in ((-0.2, 0, BLUE, "of what is kept"), (0.2, 1, GREY, "of the text")):
        shares = [one[part] * 100 for one in stats.kinds.values()]
        axis.barh(places + offset, shares, 0.38, color=colour, label=label)
    axis.set(yticks=places, yticklabels=list(stats.kinds), xlabel="% of tokens", title="kinds of tokens")
    axis.invert_yaxis()
    _plain(axis)


def _tokens(axis: "Axes", stats: BankStats) -> None:
    places = np.arange(len(stats.tokens))
    for offset, colour, shares, label in (
        (-0.2, BLUE, [one.kept_share for one in stats.tokens], "of what is kept"),
        (0.2, GREY, [one.text_share for one in stats.tokens], "of the text"),
    ):
        axis.bar(places + offset, np.array(shares) * 100, 0.38, color=colour, label=label)
    names = [one.text.replace(" ", "␣").replace("\n", "⏎").replace("$", r"\$") for one in stats.tokens]
    axis.set_xticks(places, names, rotation=45, ha="right")
    axis.set(ylabel="% of tokens", title="tokens kept most often")
    _plain(axis)


def _plain(axis: "Axes") -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
