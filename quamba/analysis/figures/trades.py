"""The picture of a comparison: what each recipe costs in accuracy against its size, and against its latencies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quamba.analysis.figures.canvas import panels, styled
from quamba.analysis.figures.pareto import TITLE, Point, draw_trade, legend_of, looks_of
from quamba.errors import QuambaError


@dataclass(frozen=True)
class Axis:
    """One quantity of every recipe.

    Attributes:
        name: in the arrays.
        label: with its unit.
        values, low, high: (recipes,) float64; NaN where a recipe has none. The bounds are of an interval.
    """

    name: str
    label: str
    values: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@styled
def trades(content: Mapping[str, Any]) -> tuple[Any, dict[str, NDArray[Any]]]:
    """Losses against costs, a row of panels for each text and accuracy, a column for each cost.

    Losses are the increase of perplexity and the points of accuracy lost, each beside float with the 95% interval of
    the paired difference; costs the checkpoint's bytes, and TTFT and TPOT where they were measured, with quartiles.
    Simulations, which have neither size nor latency, are left out. A line joins the recipes that none beats in both
    respects; their markers are filled.

    Args:
        content: what `quamba compare --json` prints.

    Returns:
        A matplotlib Figure, and the arrays that it draws: "recipes" (R,); for each quantity NAME (R,), "NAME.low" and
        "NAME.high"; for each panel "LOSS/COST.front" (R,), bool.

    Raises:
        QuambaError: the object is of another form, or holds neither a text nor a task with an accuracy.
    """
    names, losses, costs, disturbed = _read(content)
    arrays: dict[str, NDArray[Any]] = {"recipes": np.array(names)}
    for axis in (*losses, *costs):
        arrays |= {axis.name: axis.values, f"{axis.name}.low": axis.low, f"{axis.name}.high": axis.high}
    size = (3.6 * len(costs) + 2, max(3.6 * len(losses) + 0.4, 0.19 * len(names) + 1.2))
    figure, grid = panels(len(losses), len(costs), size=size, sharey="row")
    looks = looks_of(names)
    for row, loss in zip(grid, losses, strict=True):
        for axes, cost in zip(row, costs, strict=True):
            here = [i for i in range(len(names)) if not np.isnan(loss.values[i] + cost.values[i])]
            front = draw_trade(axes, [_point(names[i], cost, loss, i) for i in here], looks)
            arrays[f"{loss.name}/{cost.name}.front"] = np.array([name in front for name in names])
            axes.set_xlabel(cost.label)
            if disturbed and cost is not costs[0]:
                axes.set_title("beside other work: not to be published", color="#D55E00")
        row[0].set_ylabel(loss.label)
    figure.suptitle(TITLE, fontweight="bold")
    legend_of(figure, looks)
    return figure, arrays


def _point(name: str, cost: Axis, loss: Axis, i: int) -> Point:
    x, y = float(cost.values[i]), float(loss.values[i])
    return Point(
        name,
        cost=x,
        loss=y,
        cost_bounds=(float(cost.low[i]), float(cost.high[i])),
        loss_bounds=(float(loss.low[i]), float(loss.high[i])),
    )


def _read(content: Mapping[str, Any]) -> tuple[list[str], list[Axis], list[Axis], bool]:
    """Names, losses, costs, and whether a latency was disturbed."""
    try:
        lines = [line for line in content["lines"] if not line["simulated"]]
        several = len({line["calibration"] for line in lines} - {None}) > 1
        names = [_name(line, several=several) for line in lines]
        losses = [
            _axis(text, f"increase of perplexity on {text} [%]", [_increase(line, text) for line in lines])
            for text in lines[0]["texts"]
        ]
        for task in lines[0]["tasks"]:
            if any(line["tasks"][task]["difference"] for line in lines):
                losses.append(_axis(task, f"accuracy lost in {task} [points]", [_lost(line, task) for line in lines]))
        megabytes = [line["bytes"] / 1e6 for line in lines]
        costs = [_axis("size", "weights in a checkpoint [MB]", [(size, size, size) for size in megabytes])]
        timed = [line["latency"] for line in lines if line["latency"]]
        for time, what in (("TTFT", "batch {batch}, {prompt} tokens"), ("TPOT", "batch {batch}")) if timed else ():
            label = f"{time}, {what.format(**timed[0])} [ms]"
            costs.append(_axis(time, label, [_quartiles(line["latency"], time) for line in lines]))
        if not losses:
            raise QuambaError("found neither a text nor a task with an accuracy to draw; expected at least one")
        return names, losses, costs, any(latency["disturbed"] for latency in timed)
    except (KeyError, IndexError, TypeError) as error:
        raise QuambaError(
            f"found a comparison without {error}; expected what `quamba compare --json` prints"
        ) from error


def _name(line: Mapping[str, Any], *, several: bool) -> str:
    return f"{line['recipe']}, {line['calibration']}" if several and line["calibration"] else str(line["recipe"])


def _axis(name: str, label: str, values: Sequence[tuple[float, float, float]]) -> Axis:
    table = np.array(values, dtype=np.float64)
    return Axis(name, label, table[:, 0], table[:, 1], table[:, 2])


def _increase(line: Mapping[str, Any], text: str) -> tuple[float, float, float]:
    # The baseline has no difference to itself.
    found = line["texts"][text]["increase"] or {"mean": 0.0, "low": 0.0, "high": 0.0}
    return 100 * found["mean"], 100 * found["low"], 100 * found["high"]


def _lost(line: Mapping[str, Any], task: str) -> tuple[float, float, float]:
    found = line["tasks"][task]["difference"] or {"mean": 0.0, "low": 0.0, "high": 0.0}
    return -100 * found["mean"], -100 * found["high"], -100 * found["low"]


def _quartiles(latency: Mapping[str, Any] | None, name: str) -> tuple[float, float, float]:
    if latency is None:
        return (np.nan,) * 3
    time = latency["times"][name]
    return time["median"], time["lower"], time["upper"]
