"""The picture of a trade: accuracy against size, and against time where that was measured."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quamba.analysis.figures.canvas import COLOURS, MARKERS, panels, styled
from quamba.errors import QuambaError


@styled
def pareto(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Increase of perplexity against bytes, and against milliseconds where a row has them.

    Args:
        rows: each with "name"; "increase_percent", of the perplexity over the float model's; "low_percent" and
            "high_percent", the bounds of its interval, or neither; "bytes", of the weights; and perhaps "ms", of one
            token or one prompt, in which case "ms_label" may say of what.

    Returns:
        A matplotlib Figure; a grey line joins the rows that no other row beats in both respects.

    Raises:
        QuambaError: there are no rows, or one lacks a key or has something that is not a number.
    """
    checked = [_checked(row) for row in rows]
    if not checked:
        raise QuambaError("found no rows to draw; expected at least one")
    timed = [row for row in checked if row["ms"] is not None]
    figure, (axes,) = panels(1, 2 if timed else 1, size=(9.5 if timed else 6, 4), sharey=True)
    looks = {row["name"]: (COLOURS[i % 6], MARKERS[(i + i // 6) % 6]) for i, row in enumerate(checked)}
    _trade(axes[0], checked, looks, key="bytes", unit=1e6)
    axes[0].set_xlabel("size of the weights [MB]")
    if timed:
        _trade(axes[1], timed, looks, key="ms", unit=1)
        axes[1].set_xlabel(str(timed[0].get("ms_label", "time [ms]")))
    axes[0].set_ylabel("increase of perplexity [%]")
    figure.suptitle("What it costs against what it takes (lower left is better)", fontweight="bold")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure


def rows_of_comparison(
    content: Mapping[str, Any], text: str | None = None, *, latency: str | None = None
) -> list[dict[str, Any]]:
    """The rows for `pareto` from what `quamba compare --json` prints.

    Args:
        content: the JSON object.
        text: name of the text; None for the first.
        latency: name of the latency that gives "ms"; None for none.

    Raises:
        QuambaError: the object is of another form, or has no such text or latency.
    """
    try:
        lines = content["lines"]
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
            rows.append(
                row if latency is None else row | {"ms": line["latency"][latency], "ms_label": f"{latency} [ms]"}
            )
        return rows
    except (KeyError, IndexError, TypeError, StopIteration) as error:
        raise QuambaError(
            f"found a comparison without {error}; expected what `quamba compare --json` prints, with the text "
            f"{text!r} and the latency {latency!r} in every line"
        ) from error


def _trade(axes: Any, rows: list[dict[str, Any]], looks: dict[str, tuple[str, str]], *, key: str, unit: float) -> None:
    for row in rows:
        colour, marker = looks[row["name"]]
        middle = row["increase_percent"]
        error = [[max(0.0, middle - row["low_percent"])], [max(0.0, row["high_percent"] - middle)]]
        axes.errorbar(
            [row[key] / unit], [middle], yerr=error, color=colour, marker=marker, linestyle="none", capsize=3,
            label=row["name"],
        )  # fmt: skip
    best = frontier([(row[key] / unit, row["increase_percent"]) for row in rows])
    axes.plot(*zip(*best, strict=True), color="#999999", linewidth=1, zorder=0, drawstyle="steps-post")
    axes.set_xlim(left=0)
    spread = [row["increase_percent"] for row in rows]
    if max(spread) > 1:
        axes.set_yscale("symlog", linthresh=0.1)
        ticks = [tick for tick in (0, 0.1, 1, 10, 100) if tick <= 2 * max(spread)]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_ylim(min(-0.05, 1.5 * min(spread)), 1.8 * max(spread))


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
