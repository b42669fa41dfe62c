"""A picture of loss curves, one panel for each training stage."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_m3.manifest import atomic_path


def plot_losses(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path, *, smooth: int = 10) -> None:
    """Draw (step, loss) pairs of each stage as a PNG: every step faint, a running mean over ``smooth`` steps bold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(curves), 3.2), dpi=144, layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for panel, (stage, rows) in zip(panels, curves.items(), strict=True):
        steps, losses = zip(*rows, strict=True)
        means = [sum(losses[max(0, i - smooth + 1) : i + 1]) / min(i + 1, smooth) for i in range(len(losses))]
        panel.plot(steps, losses, color="#2a6f97", alpha=0.3, linewidth=1)
        panel.plot(steps, means, color="#2a6f97", linewidth=2)
        panel.set_title(f"{stage} stage", loc="left")
        panel.set_xlabel("step")
        last = (steps[-1], means[-1])
        panel.annotate(f"{last[1]:.2f}", last, textcoords="offset points", xytext=(-4, 8), ha="right")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("loss (nats per token)")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
