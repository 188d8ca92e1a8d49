"""What the figures say: labels, units, legends, and the data in the right places."""

import math
import struct
import sys
from typing import Any

import numpy as np
import pytest

from quamba.analysis import figures
from quamba.analysis.figures.canvas import chosen_layers, matplotlib
from quamba.analysis.sensitivity import Cost
from quamba.analysis.single import BLOCK_TENSORS, TENSORS
from quamba.errors import QuambaError
from tests.analysis import results
from tests.analysis.results import RECIPES

pytest.importorskip("matplotlib", reason="the figures need matplotlib")


def panels(figure: Any) -> list[Any]:
    """The visible panels, without colour bars."""
    return [axes for axes in figure.axes if axes.get_visible() and axes.get_label() != "<colorbar>"]


def legend(figure: Any) -> list[str]:
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_costs() -> None:
    costs = results.make_costs()
    left, right = panels(figure := figures.costs(costs))
    assert left.get_xlabel().startswith("increase of perplexity [%], 95% interval")
    assert right.get_xlabel() == "KL divergence from the float model [nats per token]"
    rows = ticks(left.yaxis)
    assert len(rows) == len(TENSORS) + 1
    assert (rows[0], rows[-1], rows[TENSORS.index("g")]) == ("u", "the whole recipe", "g (gated y)")
    assert legend(figure) == list(RECIPES)
    # The first tensor on top.
    assert left.get_ylim()[0] > left.get_ylim()[1]
    drawn = right.lines[0].get_xdata()
    np.testing.assert_allclose(drawn, [cost.kl for cost in costs if cost.recipe == RECIPES[0]])
    heights = right.lines[0].get_ydata()
    assert [round(height) for height in heights] == list(range(len(rows)))


def test_costs_without_intervals_of_one_recipe() -> None:
    (left, _) = panels(figures.costs([Cost("naive", "x", 1.0, math.nan, 0.1, 9)]))
    assert ticks(left.yaxis) == ["x"]


@pytest.mark.parametrize("at", ["y", "out"])
def test_error_map(at: str) -> None:
    errors = [results.make_errors(recipe) for recipe in RECIPES]
    figure = figures.error_map(errors, at=at)
    left, right = panels(figure)
    assert (left.get_title(), right.get_title()) == RECIPES
    assert left.get_xlabel() == "layer"
    assert ticks(left.xaxis) == ["0", "1", "3"]
    (bar,) = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert bar.get_ylabel() == "squared error / signal [dB]"
    rows = ticks(left.yaxis)
    # What does not reach y has no row there.
    assert ("z" in rows) == (at == "out")
    assert len(rows) == len(BLOCK_TENSORS) - (3 if at == "y" else 0)
    shown = right.images[0].get_array()
    row = rows.index("x")
    expected = 10 * np.log10(errors[1].nmse(at)[BLOCK_TENSORS.index("x")].numpy())
    np.testing.assert_allclose(np.asarray(shown[row]), expected)
    assert np.isnan(np.ma.filled(shown[rows.index("dt")], np.nan)).all()
    assert {text.get_text() for text in left.texts} >= {f"{expected_:.0f}" for expected_ in expected[:1]}


@pytest.mark.parametrize(("at", "count"), [("y", 8), ("out", 10)])
def test_error_over_time(at: str, count: int) -> None:
    errors = [results.make_errors(recipe) for recipe in RECIPES]
    found = panels(figure := figures.error_over_time(errors, at=at))
    assert len(found) == count
    titles = [axes.get_title() for axes in found]
    assert "only x" in titles
    assert ("only z" in titles) == (at == "out")
    assert {axes.get_yscale() for axes in found} == {"log"}
    assert found[-1].get_xlabel() == "time step [tokens]"
    assert legend(figure) == list(RECIPES)
    # 70 steps in bins of two: noise over signal of both, then the median layer.
    line = found[titles.index("only x")].lines[0]
    noise, signal = ((errors[0].y_noise, errors[0].y_signal), (errors[0].out_noise, errors[0].out_signal))[at == "out"]
    pairs = [v.reshape(3, 35, 2).sum(dim=-1).numpy() for v in (noise[BLOCK_TENSORS.index("x")], signal)]
    np.testing.assert_allclose(line.get_ydata(), np.median(pairs[0] / pairs[1], axis=0))
    np.testing.assert_allclose(line.get_xdata(), 0.5 + 2 * np.arange(35))
    # The second recipe keeps dt in float.
    assert len(found[titles.index("only dt")].lines) == 1


def test_channels() -> None:
    found = results.make_outliers()
    figure = figures.channels(found)
    axes = panels(figure)
    assert [panel.get_title() for panel in axes][:2] == ["x: scan input", "y: scan output"]
    assert figure.get_supxlabel() == "channels from the largest to the smallest [%]"
    assert figure.get_supylabel() == "largest |value| of the channel / rms of the site"
    curve = axes[0].lines[1].get_ydata()
    assert len(axes[0].lines) == 3
    assert curve[0] == pytest.approx(float(found["x"].peak()[1]))
    assert curve[-1] == pytest.approx(float(found["x"].absmax[1].min() / found["x"].sigma[1]))


def test_tails() -> None:
    found = results.make_outliers()
    left, right = panels(figures.tails(found, k=4))
    assert (left.get_ylabel(), right.get_ylabel()) == ("kurtosis of the values", "channels beyond 4 x rms [%]")
    assert ticks(left.xaxis)[:3] == ["x", "y", "g"]
    np.testing.assert_allclose(right.lines[2].get_ydata(), 100 * found["g"].share_above(4).numpy())
    assert any("normal" in text.get_text() for text in left.texts)


def test_decay() -> None:
    found = panels(figure := figures.decay(results.make_decay()))
    assert [axes.get_title() for axes in found] == ["layer 0", "layer 1", "layer 3"]
    assert figure.get_supylabel() == "norm of the product over steps 1 to t"
    assert legend(figure) == ["80% of channels", "median channel", "largest: spectral norm"]
    median, largest = found[0].lines
    assert median.get_ydata()[9] == pytest.approx(0.1)
    assert largest.get_ydata()[-1] == pytest.approx(10**-0.07)


def test_error_bounds() -> None:
    left, right = panels(figure := figures.error_bounds(results.make_bounds()))
    assert (left.get_title(), right.get_title()) == ("HiPPO-LegT, 4 states", "HiPPO-LegS, 4 states")
    assert left.get_ylabel() == "state error / largest input error"
    assert legend(figure)[0] == "measured, largest of 2"
    assert set(left.lines[3].get_ydata()) == {9.0}
    assert np.isnan(right.lines[3].get_ydata()).all()


def test_position_errors() -> None:
    left, right = panels(figure := figures.position_errors(results.make_positions()))
    assert left.get_xlabel() == right.get_xlabel() == "position [tokens]"
    assert right.get_ylabel() == "KL from float [nats per token]"
    assert "5 sequences" in figure.get_suptitle()
    assert legend(figure) == list(RECIPES)
    means = results.make_positions().kl[1].reshape(35, 2).mean(dim=1).numpy()
    np.testing.assert_allclose(right.lines[1].get_ydata(), means)


def test_a_png_on_white() -> None:
    image = figures.png(figures.decay(results.make_decay()))
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", image[16:24])
    assert 600 < width < 3000
    assert 200 < height < 3000


def test_the_processs_style_is_left_alone() -> None:
    before = dict(matplotlib().rcParams)
    figures.decay(results.make_decay())
    assert dict(matplotlib().rcParams) == before


def test_layers_are_thinned_evenly() -> None:
    assert chosen_layers((4, 5, 6)) == [0, 1, 2]
    shown = chosen_layers(range(64))
    assert (shown[0], shown[-1], len(shown)) == (0, 63, 12)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(QuambaError, match=r"quamba\[analysis\]"):
        figures.decay(results.make_decay())
