"""Figures of quamba.analysis.sensitivity: what each tensor costs, in which block, and when."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from quamba.analysis.figures.canvas import (
    COLOURS,
    LINES,
    MARKERS,
    chosen_layers,
    grid_of,
    label_bottom,
    legend_below,
    panels,
    styled,
)
from quamba.analysis.sensitivity import BlockErrors, Cost
from quamba.analysis.single import BLOCK_TENSORS, TENSORS
from quamba.recipe import BLOCK_WEIGHTS

# An error this far below the signal is the rounding of float32, not quantization.
FLOOR_DB = -100.0
_NORMAL_95 = 1.96
_AT = {"y": "scan output y", "out": "mixer output"}


@styled
def costs(found: Sequence[Cost]) -> Any:
    """Increase of perplexity and KL divergence, a row for each tensor, a mark for each recipe.

    Args:
        found: of any recipes and tensors.

    Returns:
        A matplotlib Figure.
    """
    recipes = list(dict.fromkeys(cost.recipe for cost in found))
    present = {cost.name for cost in found}
    names = [name for name in (*TENSORS, "all") if name in present]
    figure, ((left, right),) = panels(1, 2, size=(10, 1.4 + 0.3 * len(names)), sharey=True)
    for number, recipe in enumerate(recipes):
        own = [cost for cost in found if cost.recipe == recipe]
        offset = 0.32 * (number - (len(recipes) - 1) / 2) / max(1, len(recipes) - 1) if len(recipes) > 1 else 0.0
        rows = [names.index(cost.name) + offset for cost in own]
        look = {"color": COLOURS[number % 6], "marker": MARKERS[number % 6], "linestyle": "none", "markersize": 5}
        errors = [0.0 if math.isnan(c.stderr_percent) else _NORMAL_95 * c.stderr_percent for c in own]
        left.errorbar([c.increase_percent for c in own], rows, xerr=errors, capsize=2, label=recipe, **look)
        right.plot([max(c.kl, 1e-9) for c in own], rows, label=recipe, **look)
    left.set_xscale("symlog", linthresh=0.1, linscale=1.0)
    left.set_xticks([-0.1, 0, 0.1, 1, 10], ["-0.1", "0", "0.1", "1", "10"])
    left.axvline(0, color="#666666", linewidth=0.8)
    left.set_xlabel("increase of perplexity [%], 95% interval (linear within ±0.1)")
    right.set_xscale("log")
    right.set_xlabel("KL divergence from the float model [nats per token]")
    left.set_yticks(range(len(names)), [_name(name) for name in names])
    left.set_ylim(len(names) - 0.4, -0.6)
    left.set_ylabel("the only quantized tensor")
    figure.suptitle("What quantizing one tensor in all layers costs", fontweight="bold")
    legend_below(figure, left)
    return figure


@styled
def error_map(found: Sequence[BlockErrors], *, at: str) -> Any:
    """Error at y or at the mixer's output, tensor by layer, one panel for each recipe, in dB.

    Args:
        found: one for each recipe, of the same tensors and layers.
        at: "y" or "out".

    Returns:
        A matplotlib Figure.
    """
    tables = [_decibels(errors.nmse(at)) for errors in found]
    kept = [i for i in range(len(found[0].names)) if any(np.isfinite(table[i]).any() for table in tables)]
    low, high = min(np.nanmin(t[kept]) for t in tables), max(np.nanmax(t[kept]) for t in tables)
    layers = found[0].layers
    width = max(2.6, 0.42 * min(len(layers), 24) + 0.6)
    figure, (row,) = panels(1, len(found), size=(width * len(found) + 1.8, 1.5 + 0.3 * len(kept)), sharey=True)
    for axes, errors, table in zip(row, found, tables, strict=True):
        image = axes.imshow(table[kept], cmap="cividis", aspect="auto", vmin=low, vmax=high)
        axes.grid(False)
        axes.set_title(errors.recipe)
        axes.set_xlabel("layer")
        shown = chosen_layers(layers)
        axes.set_xticks(shown, [str(layers[i]) for i in shown])
        if len(layers) <= 12:
            for (i, j), value in np.ndenumerate(table[kept]):
                if np.isfinite(value):
                    dark = value < (low + high) / 2
                    axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color="w" if dark else "k")
    row[0].set_yticks(range(len(kept)), [_name(found[0].names[i]) for i in kept])
    row[0].set_ylabel("the only quantized tensor")
    figure.colorbar(image, ax=list(row), label="squared error / signal [dB]", shrink=0.8)
    figure.suptitle(f"Error at the {_AT[at]}, by layer (brighter is worse)", fontweight="bold")
    return figure


@styled
def error_over_time(found: Sequence[BlockErrors], *, at: str) -> Any:
    """Error at y or at the mixer's output by time step, a panel for each activation that moves it.

    Args:
        found: one for each recipe, of the same tensors and layers.
        at: "y" or "out".

    Returns:
        A matplotlib Figure: the median layer as a line, the layers between the 10% and 90% quantile as a band.
    """
    activations = [name for name in BLOCK_TENSORS if name not in BLOCK_WEIGHTS]
    names = [n for n in activations if n in found[0].names and _moves(found, n, at)]
    figure, axes = grid_of(len(names), columns=4, panel=(2.7, 2.0), sharex=True, sharey=True)
    for number, errors in enumerate(found):
        positions, table = _binned(errors, at)
        for panel, name in zip(axes, names, strict=True):
            own = table[errors.names.index(name)]
            if not np.isfinite(own).all():
                continue
            low, middle, high = np.quantile(own, (0.1, 0.5, 0.9), axis=0)
            panel.fill_between(positions, low, high, color=COLOURS[number % 6], alpha=0.2, linewidth=0)
            look = {"color": COLOURS[number % 6], "linestyle": LINES[number % 4], "linewidth": 1.3}
            panel.plot(positions, middle, label=errors.recipe, **look)
    for panel, name in zip(axes, names, strict=True):
        panel.set_yscale("log")
        panel.set_title(f"only {_name(name)}")
    label_bottom(axes, columns=4, text="time step [tokens]")
    figure.supylabel("squared error / signal", fontsize=9)
    figure.suptitle(f"Error at the {_AT[at]} over time (line: median layer, band: 80% of layers)", fontweight="bold")
    legend_below(figure, axes[0])
    return figure


def _name(name: str) -> str:
    return {"g": "g (gated y)", "y": "y (scan output)", "all": "the whole recipe"}.get(
        name, f"{name} weight" if name in BLOCK_WEIGHTS else name
    )


def _decibels(nmse: Tensor) -> Any:
    """float64 (S, P), NaN where there is nothing or only float rounding."""
    with np.errstate(divide="ignore"):
        found = 10 * np.log10(nmse.numpy())
    return np.where(found > FLOOR_DB, found, np.nan)


def _moves(found: Sequence[BlockErrors], name: str, at: str) -> bool:
    return any(np.isfinite(_decibels(errors.nmse(at))[errors.names.index(name)]).any() for errors in found)


def _binned(errors: BlockErrors, at: str, most: int = 64) -> tuple[Any, Any]:
    """Positions (bins,) and nmse (S, P, bins); each bin is noise over signal of its steps."""
    noise, signal = (errors.y_noise, errors.y_signal) if at == "y" else (errors.out_noise, errors.out_signal)
    width = max(1, -(-noise.shape[-1] // most))
    starts = np.arange(0, noise.shape[-1], width)
    sums = [np.add.reduceat(values.numpy(), starts, axis=-1) for values in (noise, signal)]
    ends = np.minimum(starts + width, noise.shape[-1])
    return (starts + ends - 1) / 2, sums[0] / sums[1]
