"""Figures of quamba.analysis.decay and quamba.analysis.hippo: forgetting, and errors that do not compound."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from quamba.analysis.decay import LEVELS, Decay
from quamba.analysis.figures.canvas import COLOURS, chosen_layers, grid_of, label_bottom, legend_below, panels, styled
from quamba.analysis.hippo import Bound

# What float32 would have forgotten long since.
_LOWEST = -12.0


@styled
def decay(found: Decay) -> Any:
    """The norm of the cumulative product of the state matrices, a panel for each layer (at most 12).

    Returns:
        A matplotlib Figure.
    """
    shown = chosen_layers(found.layers)
    figure, axes = grid_of(len(shown), columns=4, panel=(2.6, 2.0), sharex=True, sharey=True)
    steps = np.arange(1, found.largest.shape[1] + 1)
    clipped = np.maximum(found.quantiles.numpy(), 4 * _LOWEST)
    for panel, index in zip(axes, shown, strict=True):
        low, middle, high = (10.0 ** clipped[index, i] for i in range(len(LEVELS)))
        panel.fill_between(steps, low, high, color=COLOURS[0], alpha=0.2, linewidth=0, label="80% of channels")
        panel.plot(steps, middle, color=COLOURS[0], linewidth=1.3, label="median channel")
        largest = 10.0 ** np.maximum(found.largest[index].numpy(), 4 * _LOWEST)
        panel.plot(steps, largest, color=COLOURS[1], linewidth=1.3, linestyle="--", label="largest: spectral norm")
        panel.set_yscale("log")
        panel.set_ylim(10.0**_LOWEST, 10)
        panel.set_title(f"layer {found.layers[index]}")
    label_bottom(axes, columns=4, text="steps t [tokens]")
    figure.supylabel("norm of the product over steps 1 to t", fontsize=9)
    figure.suptitle(f"How fast the state forgets (cut at 1e{_LOWEST:.0f})", fontweight="bold")
    legend_below(figure, axes[0])
    return figure


@styled
def error_bounds(found: Sequence[Bound]) -> Any:
    """The measured error of the state beside the bounds, a panel for each system.

    Returns:
        A matplotlib Figure.
    """
    figure, (row,) = panels(1, len(found), size=(4.6 * len(found), 3.8), sharey=True)
    for axes, bound in zip(row, found, strict=True):
        steps = np.arange(1, bound.running.shape[0] + 1)
        error = bound.error.numpy()
        axes.plot(steps, error.max(axis=0), color=COLOURS[4], linewidth=0.8, label=f"measured, largest of {len(error)}")
        axes.plot(steps, np.median(error, axis=0), color=COLOURS[0], linewidth=1.3, label="measured, median")
        axes.plot(
            steps, bound.running.numpy(), color=COLOURS[1], linestyle="--", label="running bound, sum of |A...A B|"
        )
        axes.plot(
            steps,
            np.full(len(steps), np.nan if bound.closed is None else bound.closed),
            color=COLOURS[2],
            linestyle=":",
            linewidth=1.8,
            label="closed form b / (1 - a), where A is constant",
        )
        axes.set_yscale("log")
        axes.set_xlabel("steps t")
        axes.set_title(f"HiPPO-{bound.system}, {bound.states} states")
    row[0].set_ylabel("state error / largest input error")
    figure.suptitle("The error of a quantized input does not compound", fontweight="bold")
    legend_below(figure, row[0])
    return figure
