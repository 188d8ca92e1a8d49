"""How sure a figure is: standard errors, and bootstrap intervals of paired differences."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from quamba.errors import SizeError

RESAMPLES = 10_000
CONFIDENCE = 0.95
# Resampled indices held at once.
_BLOCK = 2_000_000

Values = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences with the bounds of its bootstrap interval; NaN bounds where one pair is all.

    Attributes:
        mean: of the model less the reference.
        low, high: percentiles of the resampled means.
    """

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Plain JSON types."""
        return asdict(self)


def standard_error(values: Values) -> float:
    """Of the mean of (n,) values, with Bessel's correction; NaN for a single one."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.std(ddof=1)) / math.sqrt(array.shape[0]) if array.shape[0] > 1 else math.nan


def paired_difference(
    values: Values,
    reference: Values,
    *,
    weights: Values | None = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Difference:
    """The mean difference to a reference on the same items, with a percentile bootstrap interval over the items.

    Items (windows of a text, documents of a task) are drawn with replacement, model and reference together, so what
    makes an item hard for both cancels.

    Args:
        values, reference: (n,), of the same items in the same order.
        weights: (n,), such as tokens of a window; None weighs all alike.
        resamples: how often to draw.
        confidence: share of the resampled means between the bounds.
        seed: of the draws.

    Raises:
        SizeError: the lengths differ, or there are no items.
    """
    ours, theirs = np.asarray(values, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    weight = np.ones_like(ours) if weights is None else np.asarray(weights, dtype=np.float64)
    if ours.ndim != 1 or not ours.shape[0] or not ours.shape == theirs.shape == weight.shape:
        raise SizeError(
            f"found values {ours.shape}, reference {theirs.shape} and weights {weight.shape}; "
            "expected three of one length, at least 1"
        )
    count = ours.shape[0]
    weighted = (ours - theirs) * weight
    mean = float(weighted.sum() / weight.sum())
    if count == 1:
        return Difference(mean, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, block := max(1, _BLOCK // count)):
        drawn = generator.integers(count, size=(min(block, resamples - start), count))
        means.append(weighted[drawn].sum(axis=1) / weight[drawn].sum(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Difference(mean, float(low), float(high))


def relative_increase(difference: Difference) -> Difference:
    """A difference of mean negative log-likelihoods as an increase of perplexity, 0.01 for one percent."""
    mean, low, high = (math.expm1(min(value, 700.0)) for value in (difference.mean, difference.low, difference.high))
    return Difference(mean, low, high)
