"""The picture of a trade: accuracy against size, and against time where that was measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quamba.analysis.figures.canvas import COLOURS, MARKERS, matplotlib, panels, styled
from quamba.errors import QuambaError

Bounds = tuple[float, float]

TITLE = "What is lost against what it takes (lower left is better)"
_GREY = "#999999"
# Times the greatest cost of the others.
_FAR = 1.3


@dataclass(frozen=True)
class Point:
    """One of several ways: what it takes, what it loses, and the bounds of their intervals, which hold the values."""

    name: str
    cost: float
    loss: float
    cost_bounds: Bounds
    loss_bounds: Bounds


@styled
def pareto(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Increase of perplexity against bytes, and against milliseconds where a row has them.

    Args:
        rows: each with "name"; "increase_percent", of the perplexity over the float model's; "low_percent" and
            "high_percent", the bounds of its interval, or neither; "bytes", of the weights; and perhaps "ms", of one
            token or one prompt, in which case "ms_label" may say of what.

    Returns:
        A matplotlib Figure; a grey line joins the rows that no other row beats in both respects, and their markers
        are filled.

    Raises:
        QuambaError: there are no rows, or one lacks a key or has something that is not a number.
    """
    checked = [_checked(row) for row in rows]
    if not checked:
        raise QuambaError("found no rows to draw; expected at least one")
    timed = [row for row in checked if row["ms"] is not None]
    figure, (axes,) = panels(1, 2 if timed else 1, size=(9.5 if timed else 6, 4), sharey=True)
    looks = looks_of([row["name"] for row in checked])
    draw_trade(axes[0], [_point(row, row["bytes"] / 1e6) for row in checked], looks)
    axes[0].set_xlabel("size of the weights [MB]")
    if timed:
        draw_trade(axes[1], [_point(row, row["ms"]) for row in timed], looks)
        axes[1].set_xlabel(str(timed[0].get("ms_label", "time [ms]")))
    axes[0].set_ylabel("increase of perplexity [%]")
    figure.suptitle(TITLE, fontweight="bold")
    legend_of(figure, looks)
    return figure


def rows_of_comparison(
    content: Mapping[str, Any], text: str | None = None, *, latency: str | None = None
) -> list[dict[str, Any]]:
    """The rows for `pareto` from what `quamba compare --json` prints.

    Args:
        content: the JSON object.
        text: name of the text; None for the first.
        latency: "TTFT" or "TPOT", whose median gives "ms"; None for none.

    Returns:
        A row for every line but those of simulations, which have neither size nor latency.

    Raises:
        QuambaError: the object is of another form, or has no such text or latency.
    """
    try:
        lines = [line for line in content["lines"] if not line["simulated"]]
        text = next(iter(lines[0]["texts"])) if text is None else text
        several = len({line["calibration"] for line in lines} - {None}) > 1
        rows = []
        for line in lines:
            # The baseline has no difference to itself.
            increase = line["texts"][text]["increase"] or {"mean": 0.0, "low": 0.0, "high": 0.0}
            row = {
                "name": f"{line['recipe']}, {line['calibration']}"
                if several and line["calibration"]
                else line["recipe"],
                "increase_percent": 100 * increase["mean"],
                "low_percent": 100 * increase["low"],
                "high_percent": 100 * increase["high"],
                "bytes": line["bytes"],
            }
            if latency is not None:
                row |= {"ms": line["latency"]["times"][latency]["median"], "ms_label": f"{latency} [ms]"}
            rows.append(row)
        return rows
    except (KeyError, IndexError, TypeError, StopIteration) as error:
        raise QuambaError(
            f"found a comparison without {error}; expected what `quamba compare --json` prints, with the text "
            f"{text!r} and the latency {latency!r} in every line"
        ) from error


def looks_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each of up to 36 names."""
    return {name: (COLOURS[i % 6], MARKERS[(i + i // 6) % 6]) for i, name in enumerate(names)}


def draw_trade(axes: Any, points: Sequence[Point], looks: Mapping[str, tuple[str, str]]) -> set[str]:
    """Draw points with their intervals and the line of those that no other beats; returns the names of these."""
    best = frontier([(point.cost, point.loss) for point in points])
    front = {point.name for point in points if (point.cost, point.loss) in best}
    for point in points:
        colour, marker = looks[point.name]
        axes.errorbar(
            [point.cost], [point.loss], xerr=_arms(point.cost, point.cost_bounds),
            yerr=_arms(point.loss, point.loss_bounds), color=colour, marker=marker, linestyle="none", capsize=2.5,
            markerfacecolor=colour if point.name in front else "white", label=point.name,
        )  # fmt: skip
    axes.plot(*zip(*best, strict=True), color=_GREY, linewidth=1, zorder=0, drawstyle="steps-post")
    _limit_costs(axes, points)
    losses = [point.loss for point in points]
    if max(losses) > 1:
        axes.set_yscale("symlog", linthresh=0.1)
        ticks = [tick for tick in (0, 0.1, 1, 10, 100) if tick <= 2 * max(losses)]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_ylim(min(-0.03, 1.5 * min(losses)), 1.8 * max(losses))
    return front


def _limit_costs(axes: Any, points: Sequence[Point]) -> None:
    """Room for the points, but not from 0: recipes of one width are nearly of one size.

    One that is far off, as float is, would press the others together: a note at the edge stands for it.
    """
    far = max(points, key=lambda point: point.cost)
    bounds = [bound for point in points if point is not far for bound in point.cost_bounds]
    if len(points) < 4 or far.cost < _FAR * max(bounds):
        axes.margins(x=0.08)
        return
    margin = 0.1 * (max(bounds) - min(bounds))
    axes.set_xlim(min(bounds) - margin, max(bounds) + 2 * margin)
    axes.annotate(
        f"{far.name} at {far.cost:.3g} \N{RIGHTWARDS ARROW}", xy=(1, far.loss), xycoords=("axes fraction", "data"),
        xytext=(-4, 3), textcoords="offset points", ha="right", va="bottom", fontsize=8,
    )  # fmt: skip


def legend_of(figure: Any, looks: Mapping[str, tuple[str, str]]) -> None:
    """The legend beside the panels: every name, and what line and fill say."""
    line = matplotlib().lines.Line2D
    hollow = {"linestyle": "none", "markerfacecolor": "white"}
    handles = [
        line([], [], color=colour, marker=marker, label=name, **hollow) for name, (colour, marker) in looks.items()
    ]
    handles.append(line([], [], color=_GREY, marker="o", linewidth=1, label="filled: none beats\nit in both"))
    figure.legend(handles=handles, loc="outside right center")


def _arms(middle: float, bounds: Bounds) -> list[list[float]]:
    return [[max(0.0, middle - bounds[0])], [max(0.0, bounds[1] - middle)]]


def _point(row: Mapping[str, Any], cost: float) -> Point:
    loss = row["increase_percent"]
    return Point(
        row["name"],
        cost=cost,
        loss=loss,
        cost_bounds=(cost, cost),
        loss_bounds=(row["low_percent"], row["high_percent"]),
    )


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, loss) that no other point beats in both, by rising cost."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
    found = {"ms": None, "low_percent": row.get("increase_percent"), "high_percent": row.get("increase_percent")}
    found |= {key: value for key, value in row.items() if value is not None}
    numbers = ["increase_percent", "bytes", "low_percent", "high_percent"] + (["ms"] if found["ms"] is not None else [])
    for key in numbers:
        value = found.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise QuambaError(
                f"row {row.get('name')!r}: found {value!r} for {key!r}; expected a finite number: see pareto's docs"
            )
    if not isinstance(found.get("name"), str):
        raise QuambaError(f"found a row with the name {found.get('name')!r}; expected text")
    return found
