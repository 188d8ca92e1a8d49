"""The picture of a comparison: what is drawn where, and its arrays."""

import math
from typing import Any

import numpy as np
import pytest

from quamba.analysis import figures
from quamba.errors import QuambaError

pytest.importorskip("matplotlib", reason="the figures need matplotlib")


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.01, "high": mean + 0.02}


def line(
    recipe: str, increase: float | None, points: float | None, *, size: float, tpot: float | None = None, **changes: Any
) -> dict[str, Any]:
    latency = None
    if tpot is not None:
        times = {
            name: {"median": time, "lower": 0.9 * time, "upper": 1.2 * time}
            for name, time in (("TTFT", 10 * tpot), ("TPOT", tpot))
        }
        latency = {"times": times, "prompt": 512, "batch": 2, "disturbed": False}
    found = {
        "recipe": recipe,
        "calibration": None,
        "simulated": False,
        "bytes": size * 1e6,
        "latency": latency,
        "texts": {"books": {"increase": None if increase is None else interval(increase)}},
        "tasks": {"words": {"difference": None if points is None else interval(points)}, "pages": {"difference": None}},
    }
    return found | changes


def content(**changes: Any) -> dict[str, Any]:
    return {
        "lines": [
            line("float", None, None, size=9, tpot=4.0),
            line("naive", 0.11, -0.05, size=4, tpot=2.0),
            line("good", 0.002, 0.03, size=5, tpot=1.0, **changes),
            line("few", 9.0, -0.4, size=5, simulated=True),
        ]
    }


def test_arrays() -> None:
    _, found = figures.trades(content())
    assert found["recipes"].tolist() == ["float", "naive", "good"]
    np.testing.assert_allclose(found["books"], [0, 11, 0.2])
    np.testing.assert_allclose(found["books.low"], [0, 10, -0.8])
    np.testing.assert_allclose(found["books.high"], [0, 13, 2.2])
    # Points lost: the difference with its sign and its bounds turned round.
    np.testing.assert_allclose(found["words"], [0, 5, -3])
    np.testing.assert_allclose(found["words.low"], [0, 3, -5])
    np.testing.assert_allclose(found["words.high"], [0, 6, -2])
    np.testing.assert_allclose(found["size"], [9, 4, 5])
    np.testing.assert_allclose(found["TTFT"], [40, 20, 10])
    np.testing.assert_allclose(found["TPOT.high"], [4.8, 2.4, 1.2])
    assert found["books/size.front"].tolist() == [True, True, True]
    # Nothing is faster than "good", and in words nothing better.
    assert found["books/TPOT.front"].tolist() == [True, False, True]
    assert found["words/TTFT.front"].tolist() == [False, False, True]
    assert "pages" not in found


def test_panels() -> None:
    figure, _ = figures.trades(content())
    assert len(figure.axes) == 6
    assert [axes.get_xlabel() for axes in figure.axes[:3]] == [
        "weights in a checkpoint [MB]",
        "TTFT, batch 2, 512 tokens [ms]",
        "TPOT, batch 2 [ms]",
    ]
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == [
        "increase of perplexity on books [%]",
        "accuracy lost in words [points]",
    ]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][:3] == ["float", "naive", "good"]
    assert all(axes.get_title() == "" for axes in figure.axes)
    for axes in figure.axes:
        assert len(axes.containers) == 3
        assert all(container.has_yerr for container in axes.containers)
    line = figure.axes[2].lines[-1]
    np.testing.assert_allclose(line.get_xydata(), [[1, 0.2], [4, 0]])
    assert line.get_drawstyle() == "steps-post"


def test_a_recipe_without_a_latency_and_a_disturbed_one() -> None:
    disturbed = content(latency=None)
    disturbed["lines"][1]["latency"]["disturbed"] = True
    figure, found = figures.trades(disturbed)
    assert math.isnan(found["TTFT"][2])
    assert found["books/TTFT.front"].tolist() == [True, True, False]
    assert [len(axes.containers) for axes in figure.axes[:3]] == [3, 2, 2]
    assert [axes.get_title() for axes in figure.axes[:3]] == ["", *["beside other work: not to be published"] * 2]


def test_without_latencies_there_is_one_column_and_calibrations_are_named() -> None:
    lines = [
        line("float", None, None, size=9),
        line("a", 0.1, -0.1, size=5, calibration="x"),
        line("a", 0.2, 0.0, size=5, calibration="y"),
    ]
    figure, found = figures.trades({"lines": lines})
    assert len(figure.axes) == 2
    assert found["recipes"].tolist() == ["float", "a, x", "a, y"]
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        data = figures.image(figure, kind)
        assert data.startswith(start)
        assert figures.image(figure, kind) == data


def test_malformed_comparisons_are_refused() -> None:
    with pytest.raises(QuambaError, match="without 'lines'"):
        figures.trades({})
    plain = [line("float", None, None, size=9, texts={}), line("a", 0.1, None, size=5, texts={})]
    with pytest.raises(QuambaError, match="neither a text nor a task with an accuracy"):
        figures.trades({"lines": plain})
