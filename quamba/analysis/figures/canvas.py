"""What all figures share: matplotlib, found late; one style; colours that the colour-blind can tell apart; files."""

import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

from quamba.errors import QuambaError

P = ParamSpec("P")
R = TypeVar("R")

# Okabe and Ito's palette, darkest first, without the yellow that white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
LINES = ("-", (0, (4, 2)), (0, (1, 1.5)), "-.")
MARKERS = ("o", "s", "D", "^", "v", "P")
DPI = 144
FORMATS = ("png", "svg")
_STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "font.size": 9,
    "font.family": "DejaVu Sans",
    # Names inside an SVG do not change from run to run.
    "svg.hashsalt": "quamba",
}


def matplotlib() -> ModuleType:
    """The package. Raises QuambaError where it is not installed."""
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.lines
    except ImportError as error:
        raise QuambaError(
            "found no matplotlib; expected it for figures: pip install 'quamba[analysis]', or matplotlib itself"
        ) from error
    package: ModuleType = matplotlib
    return package


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorator: draw in this module's style, whatever the process's own is."""

    @wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        style: AbstractContextManager[None] = matplotlib().rc_context(_STYLE)
        with style:
            return draw(*args, **kwargs)

    return wrapper


def panels(rows: int, columns: int, *, size: tuple[float, float], **sharing: Any) -> tuple[Any, Any]:
    """A figure and its axes (rows, columns); size in inches of the whole."""
    figure = matplotlib().figure.Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **sharing)


def grid_of(count: int, *, columns: int, panel: tuple[float, float], **sharing: Any) -> tuple[Any, list[Any]]:
    """A figure with so many panels in rows of `columns`; the places left over stay empty."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = panels(rows, columns, size=(panel[0] * columns, panel[1] * rows), **sharing)
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.set_visible(False)
    return figure, flat[:count]


def label_bottom(axes: Sequence[Any], *, columns: int, text: str) -> None:
    """Name the horizontal axis under the lowest panel of each column; `axes` as `grid_of` gave them."""
    for panel in axes[-min(columns, len(axes)) :]:
        panel.set_xlabel(text)
        panel.tick_params(labelbottom=True)


def legend_below(figure: Any, axes: Any, *, columns: int = 4) -> None:
    """One legend for the whole figure, under its panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))


def chosen_layers(layers: Sequence[int], most: int = 12) -> list[int]:
    """Indices of at most so many layers, evenly spaced, first and last among them."""
    count = len(layers)
    return list(range(count)) if count <= most else sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def png(figure: Any) -> bytes:
    """The figure as a PNG file's bytes."""
    return image(figure, "png")


@styled
def image(figure: Any, kind: str) -> bytes:
    """The figure as the bytes of a file of one of FORMATS; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=DPI, facecolor="white", metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
