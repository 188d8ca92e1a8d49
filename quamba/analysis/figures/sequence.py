"""Figure of quamba.analysis.length: errors by position in the sequence."""

from typing import Any

import numpy as np

from quamba.analysis.figures.canvas import COLOURS, legend_below, panels, styled
from quamba.analysis.length import PositionErrors


@styled
def position_errors(found: PositionErrors) -> Any:
    """Error of the hidden states, and KL divergence, by position; means over up to 64 stretches of the sequence.

    Returns:
        A matplotlib Figure.
    """
    figure, ((left, right),) = panels(1, 2, size=(9, 3.6))
    length = found.kl.shape[1]
    starts = np.arange(0, length, max(1, -(-length // 64)))
    ends = np.append(starts[1:], length)
    for axes, values in ((left, found.nmse), (right, found.kl)):
        means = np.add.reduceat(values.numpy(), starts, axis=1) / (ends - starts)
        for number, (name, row) in enumerate(zip(found.names, means, strict=True)):
            axes.plot((starts + ends - 1) / 2, row, color=COLOURS[number % 6], linewidth=1.2, label=name)
        axes.set_yscale("log")
        axes.set_xlabel("position [tokens]")
    left.set_title("last hidden state")
    left.set_ylabel("squared error / signal")
    right.set_title("next-token distribution")
    right.set_ylabel("KL from float [nats per token]")
    figure.suptitle(f"Error of the quantized model along {found.sequences} sequences", fontweight="bold")
    legend_below(figure, left)
    return figure
