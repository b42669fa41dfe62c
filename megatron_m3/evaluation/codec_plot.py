"""A picture of rate and distortion: what codecs cost against the bytes of a key or value."""

from collections.abc import Sequence
from pathlib import Path

from megatron_m3.evaluation.codec_table import CodecResult
from megatron_m3.manifest import atomic_path

OURS, OTHERS = "#d9702b", "#2f6fb7"
LEAST = 1e-3
"""Costs below this, which lines as few as can be scored cannot tell from none, are drawn here."""


def plot_codecs(path: Path, results: Sequence[CodecResult], title: str) -> None:
    """Write a PNG: on the left the loss above exact memories, on the right the error of attention outputs.

    Both against the bytes of a vector, on log axes; the codec KLT is orange, others are blue.
    """
    from matplotlib.figure import Figure

    lossy = [one for one in results if one.cost is not None]
    figure = Figure(figsize=(10.5, 4.6), dpi=144, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    costs, errors = [max(one.cost or 0, LEAST) for one in lossy], [one.outputs for one in lossy]
    for axes, heights in ((left, costs), (right, errors)):
        for one, height in zip(lossy, heights, strict=True):
            colour = OURS if one.codec.startswith("KLT") else OTHERS
            axes.plot(one.vector_bytes, height, "o", color=colour, markersize=5)
            axes.annotate(one.codec, (one.vector_bytes, height), textcoords="offset points", xytext=(5, 3), fontsize=6)
        axes.set(xscale="log", yscale="log", xlabel="bytes of a key or value")
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    bytes_drawn = sorted({one.vector_bytes for one in lossy})
    right.set_xticks(bytes_drawn, [f"{one:g}" for one in bytes_drawn], fontsize=7)
    right.minorticks_off()
    left.axhline(0.05, color="#999999", linestyle="--", linewidth=0.8)
    left.set(ylabel="nats per token above exact memories", title=title)
    right.set(ylabel="squared error of attention outputs, share")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
