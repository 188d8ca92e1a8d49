"""How large the largest values of a site are against the others, before and after the rotation.

The views of the values, each in every layer:

    x        the scan's input
    y        the scan's output, before the gate
    g        the gated output, which out_proj reads
    H y, H g the same, rotated by the Hadamard matrix of their width
    g*       g as the recipe quantizes it: smoothed, rotated, or neither
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quamba import ops
from quamba.analysis.study import Study, watch_scans
from quamba.data import batches
from quamba.errors import CalibrationError
from quamba.observers import Histogram, make_observer
from quamba.recipe import QuantSpec

VIEWS = ("x", "y", "g", "H y", "H g", "g*")


@dataclass(frozen=True, eq=False)
class Outliers:
    """The distribution of one view's values, layer by layer.

    Attributes:
        view: one of VIEWS.
        layers: P layer numbers.
        absmax: float64 (P, D), each channel's largest magnitude.
        sigma: float64 (P,), root mean square of all values.
        median: float64 (P,), median magnitude of all values, to the width of a histogram bin.
        kurtosis: float64 (P,), E[v^4] / E[v^2]^2 of all values: 3 for a normal distribution.
    """

    view: str
    layers: tuple[int, ...]
    absmax: Tensor
    sigma: Tensor
    median: Tensor
    kurtosis: Tensor

    def share_above(self, k: float) -> Tensor:
        """float64 (P,): the share of channels whose largest magnitude exceeds k times sigma."""
        return (self.absmax > k * self.sigma[:, None]).to(torch.float64).mean(dim=1)

    def peak(self) -> Tensor:
        """float64 (P,): the largest magnitude over sigma."""
        return self.absmax.amax(dim=1) / self.sigma

    def quantiles(self, levels: Iterable[float]) -> Tensor:
        """float64 (P, Q): quantiles over the channels of absmax / sigma."""
        levels = torch.tensor(list(levels), dtype=torch.float64)
        return torch.quantile(self.absmax / self.sigma[:, None], levels, dim=1).T


@dataclass
class _Sums:
    """Running sums of one view in one layer."""

    second: float = 0.0
    fourth: float = 0.0
    count: int = 0
    absmax: Tensor | None = None
    histogram: Any = field(default_factory=lambda: make_observer(QuantSpec("tensor", "percentile", 0.999)))

    def add(self, values: Tensor) -> None:
        """Take in (T, D)."""
        values = values.to(torch.float32)
        squares = values.square().to(torch.float64)
        self.second += float(squares.sum())
        self.fourth += float(squares.square().sum())
        self.count += values.numel()
        largest = values.abs().amax(dim=0)
        self.absmax = largest if self.absmax is None else torch.maximum(self.absmax, largest)
        self.histogram.update(values)


@torch.no_grad()
def outliers(study: Study, data: Iterable[Any]) -> dict[str, Outliers]:
    """The distribution of every view over some sequences, by view.

    Args:
        study: of the recipe whose coordinates "g*" are.
        data: sequences without padding, as for `quamba.quantize`.

    Raises:
        CalibrationError: the data is malformed or empty.
    """
    opened = study.opened
    sums = {(view, layer): _Sums() for view in VIEWS for layer in opened.layers}

    def see(layer: int, site: str, value: Tensor) -> None:
        if site == "x":
            sums["x", layer].add(value.flatten(0, 1))
        elif site == "g":
            for view, seen in (("g", value), ("H g", ops.hadamard(value)), ("g*", study.transforms[layer].to_g(value))):
                sums[view, layer].add(seen.flatten(0, 1))

    def watch(layer: int) -> Any:
        return lambda site, value, mask: see(layer, site, value)

    try:
        for layer, mixer in opened.mixers.items():
            mixer.observer = watch(layer)
        for scans in watch_scans(opened, batches(data, samples=None, device=opened.device)):
            for layer, scan in scans.items():
                sums["y", layer].add(scan.y.flatten(0, 1))
                sums["H y", layer].add(ops.hadamard(scan.y).flatten(0, 1))
    finally:
        for mixer in opened.mixers.values():
            mixer.observer = None
    return {view: _summary(view, opened.layers, [sums[view, layer] for layer in opened.layers]) for view in VIEWS}


def _summary(view: str, layers: tuple[int, ...], found: list[_Sums]) -> Outliers:
    def column(numbers: Iterable[float]) -> Tensor:
        return torch.tensor(list(numbers), dtype=torch.float64)

    def median(histogram: Histogram) -> float:
        return float(histogram.quantile(0.5))

    second = column(s.second / s.count for s in found)
    if not bool(second.isfinite().all()):
        raise CalibrationError(f"found NaN or infinite values of {view!r}; expected numbers: check the model")
    return Outliers(
        view=view,
        layers=layers,
        absmax=torch.stack([s.absmax.to("cpu", torch.float64) for s in found if s.absmax is not None]),
        sigma=second.sqrt(),
        median=column(median(s.histogram) for s in found),
        kurtosis=column(s.fourth / s.count for s in found) / second.square(),
    )
