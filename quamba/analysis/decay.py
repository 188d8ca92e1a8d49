"""How fast the recurrence forgets: the norm of the cumulative product of its state matrices.

Mamba's state matrix at step t is diagonal, exp(dt_t A) with A < 0, so the spectral norm of the product over steps
1..t of one channel is exp(a sum dt), where a is the entry of A nearest to zero, and that of a layer is the largest of
its channels'. An error of x made at step 0 reaches step t through this product.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quamba.analysis.study import OpenModel, watch_scans
from quamba.data import batches
from quamba.errors import CalibrationError

LEVELS = (0.1, 0.5, 0.9)


@dataclass(frozen=True, eq=False)
class Decay:
    """Decadic logarithms of the norms.

    Attributes:
        layers: P layer numbers.
        quantiles: float64 (P, len(LEVELS), L), over channels and sequences, of the channels' norms.
        largest: float64 (P, L), the layer's spectral norm, the largest over the sequences.
    """

    layers: tuple[int, ...]
    quantiles: Tensor
    largest: Tensor


@torch.no_grad()
def decay(opened_model: OpenModel, data: Iterable[Any]) -> Decay:
    """Follow the cumulative product over some sequences of one length.

    Args:
        opened_model: the model.
        data: one batch of sequences, (B, L), as for `quamba.quantize`.

    Raises:
        CalibrationError: the data is malformed, or sequences differ in length.
    """
    found: dict[int, list[Tensor]] = {layer: [] for layer in opened_model.layers}
    for scans in watch_scans(opened_model, batches(data, samples=None, device=opened_model.device)):
        for layer, scan in scans.items():
            found[layer].append(log_norms(scan.dt, scan.A).cpu())
    lengths = {tensor.shape[1] for tensors in found.values() for tensor in tensors}
    if len(lengths) != 1:
        raise CalibrationError(f"found sequences of the lengths {sorted(lengths)}; expected one length")
    logs = [torch.cat(found[layer]).transpose(1, 2).flatten(0, 1) for layer in opened_model.layers]
    return Decay(
        layers=opened_model.layers,
        quantiles=torch.stack([torch.from_numpy(np.quantile(log.numpy(), LEVELS, axis=0)) for log in logs]),
        largest=torch.stack([log.amax(dim=0) for log in logs]),
    )


def log_norms(dt: Tensor, A: Tensor) -> Tensor:
    """Decadic logarithm of the spectral norm of exp(dt_1 A) ... exp(dt_t A), channel by channel.

    Args:
        dt: (B, L, D), positive.
        A: (D, N), negative.

    Returns:
        float64 (B, L, D).
    """
    slowest = A.to(torch.float64).amax(dim=1)
    return dt.to(torch.float64).cumsum(dim=1) * slowest / torch.log(torch.tensor(10.0, dtype=torch.float64))
