"""Figures of quamba.analysis.outliers: how far the channels reach, and how heavy the tails are."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from quamba.analysis.figures.canvas import COLOURS, MARKERS, grid_of, matplotlib, panels, styled
from quamba.analysis.outliers import Outliers

_LEVELS = np.linspace(0, 1, 201)
_NORMAL_KURTOSIS = 3
_TITLES = {
    "x": "x: scan input",
    "y": "y: scan output",
    "g": "g: gated output",
    "H y": "y, rotated",
    "H g": "g, rotated",
    "g*": "g as the recipe has it",
}


@styled
def channels(found: Mapping[str, Outliers]) -> Any:
    """The channels' largest magnitudes, sorted, over the root mean square of the site: a line for each layer.

    Args:
        found: by view, of the same layers.

    Returns:
        A matplotlib Figure.
    """
    figure, axes = grid_of(len(found), columns=3, panel=(3.2, 2.4), sharex=True, sharey=True)
    layers = next(iter(found.values())).layers
    scale = matplotlib().colors.Normalize(vmin=min(layers), vmax=max(max(layers), min(layers) + 1))
    shades = matplotlib().colormaps["viridis"]
    for panel, (view, outliers) in zip(axes, found.items(), strict=True):
        curves = outliers.quantiles(_LEVELS).numpy()
        for layer, curve in zip(layers, curves, strict=True):
            panel.plot(100 * _LEVELS, curve[::-1], color=shades(0.9 * scale(layer)), linewidth=1)
        panel.set_yscale("log")
        panel.set_title(_TITLES.get(view, view))
    figure.supxlabel("channels from the largest to the smallest [%]", fontsize=9)
    figure.supylabel("largest |value| of the channel / rms of the site", fontsize=9)
    truncated = matplotlib().colors.ListedColormap(shades(np.linspace(0, 0.9, 256)))
    figure.colorbar(matplotlib().cm.ScalarMappable(norm=scale, cmap=truncated), ax=axes, label="layer", shrink=0.7)
    figure.suptitle("How far the channels reach", fontweight="bold")
    return figure


@styled
def tails(found: Mapping[str, Outliers], *, k: float = 10.0) -> Any:
    """Kurtosis, and the share of channels that reach beyond k times the rms; a mark for each layer.

    Args:
        found: by view, of the same layers.
        k: in units of the site's root mean square.

    Returns:
        A matplotlib Figure.
    """
    figure, ((left, right),) = panels(1, 2, size=(9, 3.4))
    for number, (view, outliers) in enumerate(found.items()):
        count = len(outliers.layers)
        across = number + 0.5 * (np.arange(count) / max(count - 1, 1) - 0.5) * (count > 1)
        look = {"color": COLOURS[number % 6], "marker": MARKERS[number % 6], "linestyle": "none", "markersize": 4}
        left.plot(across, outliers.kurtosis.numpy(), label=view, **look)
        right.plot(across, 100 * outliers.share_above(k).numpy(), label=view, **look)
    left.axhline(_NORMAL_KURTOSIS, color="#666666", linewidth=0.8, linestyle="--")
    left.annotate("normal distribution: 3", (0.01, _NORMAL_KURTOSIS), xycoords=("axes fraction", "data"), fontsize=7,
                  va="top", xytext=(0, -2), textcoords="offset points", color="#444444")  # fmt: skip
    left.set_yscale("log")
    left.set_ylim(bottom=2)
    left.set_ylabel("kurtosis of the values")
    right.set_ylabel(f"channels beyond {k:g} x rms [%]")
    for axes in (left, right):
        axes.set_xticks(range(len(found)), [_short(view) for view in found])
        axes.grid(axis="x", visible=False)
    figure.suptitle("How heavy the tails are (each group: first to last layer)", fontweight="bold")
    return figure


def _short(view: str) -> str:
    return {"H y": "y rotated", "H g": "g rotated", "g*": "g of the\nrecipe"}.get(view, view)
