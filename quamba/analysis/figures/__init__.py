"""Figures of the analysis; each function takes what the function of that topic returned, and needs matplotlib."""

from quamba.analysis.figures.canvas import FORMATS, image, png
from quamba.analysis.figures.outliers import channels, tails
from quamba.analysis.figures.pareto import frontier, pareto, rows_of_comparison
from quamba.analysis.figures.sensitivity import costs, error_map, error_over_time
from quamba.analysis.figures.sequence import position_errors
from quamba.analysis.figures.systems import decay, error_bounds
from quamba.analysis.figures.trades import trades

__all__ = [
    "FORMATS",
    "channels",
    "costs",
    "decay",
    "error_bounds",
    "error_map",
    "error_over_time",
    "frontier",
    "image",
    "pareto",
    "png",
    "position_errors",
    "rows_of_comparison",
    "tails",
    "trades",
]
