"""Independent arithmetic for the tests of the analysis, in NumPy and float64."""

from typing import Any

import numpy as np
from torch import Tensor

from quamba.nn.mixer import Mixer


def sites_of(mixer: Mixer, hidden: Tensor) -> dict[str, Any]:
    """float64 values of every site of a float mixer."""
    found: dict[str, Any] = {}
    mixer.observer = lambda site, value, mask: found.__setitem__(site, value.double().numpy())
    mixer(hidden)
    mixer.observer = None
    return found


def scan(mixer: Mixer, found: dict[str, Any]) -> Any:
    """(B, L, D): the scan's output before the gate, by the recurrence."""
    w = {name: tensor.double().numpy() for name, tensor in mixer.tensors().items()}
    x, B, C = found["x"], found["B"], found["C"]
    dt = np.logaddexp(0, found["dt"] + w["dt_bias"])
    A = -np.exp(w["A_log"])
    state = np.zeros((x.shape[0], *A.shape))
    rows = []
    for t in range(x.shape[1]):
        decay = np.exp(dt[:, t, :, None] * A)
        state = decay * state + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        rows.append((state * C[:, t, None, :]).sum(axis=2) + w["D"] * x[:, t])
    return np.stack(rows, axis=1)


def rounded(values: Any, alpha: float) -> Any:
    """Values quantized to 8 bits with one scale, and back."""
    step = alpha / 127
    return step * np.clip(np.round(values / step), -128, 127)


def silu(values: Any) -> Any:
    return values / (1 + np.exp(-values))
