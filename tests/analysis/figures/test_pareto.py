"""The trade: frontier, labels, and rows of a comparison."""

from typing import Any

import pytest

from quamba.analysis.figures import frontier, pareto, rows_of_comparison
from quamba.errors import QuambaError

pytest.importorskip("matplotlib", reason="the figures need matplotlib")

ROWS: list[dict[str, Any]] = [
    {"name": "float", "increase_percent": 0.0, "bytes": 9_000_000, "ms": 4.0},
    {"name": "a", "increase_percent": 12.0, "low_percent": 11.0, "high_percent": 14.0, "bytes": 5e6, "ms": 1.0},
    {"name": "b", "increase_percent": 0.2, "low_percent": 0.1, "high_percent": 0.3, "bytes": 5_000_000, "ms": None},
]


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_frontier_is_what_nothing_beats() -> None:
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 5.0), (2.5, 1.0), (4.0, 0.5), (1.0, 6.0)]
    assert frontier(points) == [(1.0, 5.0), (2.5, 1.0), (4.0, 0.5)]


def test_size_and_time() -> None:
    figure = pareto([row | {"ms_label": "TPOT [ms]"} for row in ROWS])
    size, time = figure.axes
    assert size.get_xlabel() == "size of the weights [MB]"
    assert size.get_ylabel() == "increase of perplexity [%]"
    assert time.get_xlabel() == "TPOT [ms]"
    assert legend(figure) == ["float", "a", "b", "filled: none beats\nit in both"]
    left, right = size.get_xlim()
    assert left < 5 < 9 < right
    # Beaten by b, which is as large: hollow.
    assert [c.lines[0].get_markerfacecolor() == "white" for c in size.containers] == [False, True, False]
    low, high = size.get_ylim()
    assert low < 0
    assert high > 14
    assert [float(c.lines[0].get_xdata()[0]) for c in size.containers] == [9.0, 5.0, 5.0]
    assert len(time.containers) == 2


def test_a_cost_far_off_is_a_note() -> None:
    near = [ROWS[2] | {"name": f"n{i}", "bytes": 5_000_000 + 100_000 * i} for i in range(3)]
    (axes,) = pareto([*near, ROWS[0] | {"ms": None}]).axes
    assert axes.get_xlim() == pytest.approx((4.98, 5.24))
    (note,) = axes.texts
    assert note.get_text() == "float at 9 →"
    (axes,) = pareto([*near, ROWS[0] | {"ms": None, "bytes": 6_000_000}]).axes
    assert not axes.texts
    assert axes.get_xlim()[1] > 6


def test_without_times_there_is_one_panel_and_a_linear_axis() -> None:
    (axes,) = pareto([ROWS[0] | {"ms": None}, ROWS[2]]).axes
    assert axes.get_yscale() == "linear"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"bytes": None}, "'bytes'"),
        ({"increase_percent": float("nan")}, "nan"),
        ({"ms": "4"}, "'4'"),
        ({"name": 3}, "name 3"),
        ({"bytes": True}, "True"),
    ],
)
def test_malformed_rows_are_refused(change: dict[str, Any], found: str) -> None:
    with pytest.raises(QuambaError, match=found):
        pareto([ROWS[1] | change])


def test_no_rows_are_refused() -> None:
    with pytest.raises(QuambaError, match="no rows"):
        pareto([])


def line(recipe: str, calibration: str | None, increase: dict[str, float] | None) -> dict[str, Any]:
    texts = {"books": {"increase": increase, "perplexity": 30.0}, "wiki": {"increase": increase, "perplexity": 90.0}}
    latency = {"times": {"TPOT": {"median": 2.0}}}
    found = {"recipe": recipe, "calibration": calibration, "bytes": 7, "latency": latency, "texts": texts}
    return found | {"simulated": recipe.endswith("w4a4")}


def test_rows_of_a_comparison() -> None:
    increase = {"mean": 0.02, "low": 0.01, "high": 0.04}
    content = {
        "lines": [line("float", None, None), line("naive", "books", increase), line("a-w4a4", "books", increase)]
    }
    base, naive = rows_of_comparison(content, "wiki", latency="TPOT")
    assert base["increase_percent"] == 0
    expected = {"increase_percent": 2.0, "low_percent": 1.0, "high_percent": 4.0, "bytes": 7, "ms": 2.0}
    assert {key: naive[key] for key in expected} == pytest.approx(expected)
    assert (naive["name"], naive["ms_label"]) == ("naive", "TPOT [ms]")
    assert "ms" not in rows_of_comparison(content)[0]
    assert len(pareto(rows_of_comparison(content)).axes) == 1


def test_rows_of_several_calibrations_say_which() -> None:
    increase = {"mean": 0.02, "low": 0.01, "high": 0.04}
    lines = [line("float", None, None), line("naive", "books", increase), line("naive", "wiki", increase)]
    assert [row["name"] for row in rows_of_comparison({"lines": lines})] == ["float", "naive, books", "naive, wiki"]


@pytest.mark.parametrize("content", [{}, {"lines": []}, {"lines": [line("float", None, None)]}])
def test_malformed_comparisons_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(QuambaError, match="quamba compare --json"):
        rows_of_comparison(content, "pile" if content.get("lines") else None)
