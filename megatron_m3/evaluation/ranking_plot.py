"""A picture of what each layer and each kv head saves by reading memories."""

from pathlib import Path

import numpy as np

from megatron_m3.evaluation.layer_ranking import Choice
from megatron_m3.manifest import atomic_path

CHOSEN, OTHER = "#2a9d62", "#c9c9c9"


def plot_ranking(path: Path, layers: Choice, heads: Choice | None, shape: tuple[int, int]) -> None:
    """Write a PNG: bars by layer, the chosen ones coloured, and below them a heat map by layer and head.

    Args:
        path: file to write.
        layers: the choice of layers.
        heads: the choice of single heads, if there is one.
        shape: layers and kv heads of the model.
    """
    from matplotlib.figure import Figure

    num_layers, num_heads = shape
    rows = 1 if heads is None else 2
    figure = Figure(figsize=(8, 2.8 + (0.6 + 0.22 * num_heads) * (rows - 1)), dpi=144, layout="constrained")
    panels = figure.subplots(rows, 1, squeeze=False, sharex=True, height_ratios=[3, 1 + 0.15 * num_heads][:rows])[:, 0]
    chosen = {unit[0] for unit in layers.units}
    panels[0].bar(range(num_layers), [layers.saves[(layer,)] for layer in range(num_layers)],
                  color=[CHOSEN if layer in chosen else OTHER for layer in range(num_layers)])
    panels[0].set(ylabel="nats per token saved",
                  title=f"What a layer's memories save beside {len(layers.units)} chosen layers (green)")
    panels[0].axhline(0, color="black", linewidth=0.6)
    panels[0].spines[["top", "right"]].set_visible(False)
    if heads is not None:
        saves = np.array([[heads.saves[(layer, head)] for layer in range(num_layers)] for head in range(num_heads)])
        image = panels[1].imshow(saves, aspect="auto", cmap="Greens", vmin=0, interpolation="nearest")
        for layer, head in heads.units:
            panels[1].plot(layer, head, "o", color="black", markersize=2.5)
        panels[1].set(ylabel="kv head", yticks=range(num_heads),
                      title=f"The same for single heads beside {len(heads.units)} chosen ones (dots)")
        figure.colorbar(image, ax=panels[1], pad=0.01)
    panels[-1].set(xlabel="layer", xticks=range(0, num_layers, max(1, num_layers // 15)))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
