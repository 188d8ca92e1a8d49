"""Observers: what calibration keeps of the values at one site, and the clipping magnitude it gives.

Each is a small class with bounded state, fed once per batch, and mergeable: the statistics of two shards of the data
merge into those of one pass over both.
"""

import math
from abc import ABC, abstractmethod
from functools import lru_cache

import torch
from torch import Tensor

from quamba.errors import CalibrationError, RecipeError
from quamba.recipe import QuantSpec

# The histogram's bins: 2^11 equal ones in each binade from 2^-40 to 2^40, so a bin is at most 2^-11 (0.049%) wide
# relative to the values in it. Bin 0 takes zero and what is smaller than 2^-40.
_MANTISSA_BITS = 11
_LOW, _HIGH = -40, 40
_SHIFT = 23 - _MANTISSA_BITS
_OFFSET = ((127 + _LOW) << _MANTISSA_BITS) - 1
BINS = ((_HIGH - _LOW) << _MANTISSA_BITS) + 1
# Values binned at a time: the index of a chunk stays in the cache.
_CHUNK = 1 << 20


class Observer(ABC):
    """What is kept of one site. Statistics live on the device of the first values."""

    count = 0

    def update(self, values: Tensor) -> None:
        """Take in one batch.

        Args:
            values: (T, D) any float dtype, padding already removed.

        Raises:
            CalibrationError: values are NaN or infinite, or of the wrong shape. The statistics stay as they were.
        """
        if values.dim() != 2 or not values.is_floating_point():
            raise CalibrationError(f"found values {tuple(values.shape)} of {values.dtype}; expected floats (T, D)")
        if values.numel():
            self._update(values.detach())
            self.count += values.shape[0]

    def merge(self, other: "Observer") -> None:
        """Take in what another observer of the same kind has seen.

        Raises:
            CalibrationError: the other is of another kind or was made with other settings.
        """
        if type(self) is not type(other) or self._settings() != other._settings():
            raise CalibrationError(
                f"found {type(other).__name__}{other._settings()} to merge into "
                f"{type(self).__name__}{self._settings()}; expected an observer of the same kind and settings"
            )
        if other.count:
            self._merge(other)
            self.count += other.count

    def alpha(self) -> Tensor:
        """The clipping magnitude, float32 () or, per channel, (D,), on the device of the first values.

        Raises:
            CalibrationError: there were no values.
        """
        if not self.count:
            raise CalibrationError("found no values at a site; expected at least one token of calibration data")
        return self._alpha().to(torch.float32)

    @abstractmethod
    def clipped(self) -> float:
        """The share of the values seen whose magnitude is beyond alpha(), in [0, 1]."""

    @abstractmethod
    def _update(self, values: Tensor) -> None: ...

    @abstractmethod
    def _merge(self, other: "Observer") -> None: ...

    @abstractmethod
    def _alpha(self) -> Tensor: ...

    def _settings(self) -> tuple[object, ...]:
        return ()


def _finite(maximum: Tensor) -> Tensor:
    # A maximum is NaN or infinite where any of its values is: no pass over the values of its own is needed.
    if not bool(torch.isfinite(maximum).all()):
        raise CalibrationError(
            "found NaN or infinite values; expected finite ones; check the float model on the calibration data "
            "(half precision that overflows runs in bfloat16 or float32)"
        )
    return maximum


def _magnitudes_max(values: Tensor) -> Tensor:
    low, high = torch.aminmax(values)
    return _finite(torch.maximum(-low, high).to(torch.float32))


def _channels(found: int, expected: int) -> None:
    if found != expected:
        raise CalibrationError(f"found values of {found} channels; expected {expected}, as in the values before")


class AbsMax(Observer):
    """The largest magnitude, per tensor or per channel: nothing is clipped."""

    def __init__(self, *, per_channel: bool) -> None:
        self.per_channel = per_channel
        self.maximum: Tensor | None = None

    def _update(self, values: Tensor) -> None:
        if self.per_channel:
            # Not aminmax, whose reduction over the first dimension is several times slower.
            self._take(_finite(torch.maximum(-values.amin(dim=0), values.amax(dim=0)).to(torch.float32)))
        else:
            self._take(_magnitudes_max(values))

    def _take(self, maximum: Tensor) -> None:
        if self.maximum is None:
            self.maximum = maximum
            return
        _channels(maximum.numel(), self.maximum.numel())
        self.maximum = torch.maximum(self.maximum, maximum.to(self.maximum.device))

    def _merge(self, other: Observer) -> None:
        assert isinstance(other, AbsMax)
        assert other.maximum is not None
        self._take(other.maximum)

    def _alpha(self) -> Tensor:
        assert self.maximum is not None
        return self.maximum

    def clipped(self) -> float:
        """0: nothing lies beyond the largest magnitude."""
        return 0.0

    def _settings(self) -> tuple[object, ...]:
        return (self.per_channel,)


class Histogram(Observer):
    """How often each magnitude occurs over a whole site, in fixed logarithmic bins; alpha() is the largest one.

    The bins come straight from the bits of the float32 magnitudes: exponent and top 11 bits of the mantissa. Every
    value is known to 2^-11 (0.049%) of itself, the largest exactly; magnitudes under 2^-40 count as zero. Merging is
    exact. The state is BINS int64 counts (1.3 MB), whatever the amount of data.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self.maximum: Tensor | None = None

    def _update(self, values: Tensor) -> None:
        maximum = _magnitudes_max(values)
        if bool(maximum >= 2.0**_HIGH):
            raise CalibrationError(
                f"found a value of magnitude {float(maximum):.3g}; expected less than 2^{_HIGH}; "
                "check the float model on the calibration data"
            )
        counts = torch.zeros(BINS, dtype=torch.int64, device=values.device)
        flat = values.flatten()
        for start in range(0, flat.numel(), _CHUNK):
            index = flat[start : start + _CHUNK].to(torch.float32).abs().view(torch.int32)
            index = index.bitwise_right_shift(_SHIFT).sub_(_OFFSET).clamp_(min=0)
            counts += torch.bincount(index, minlength=BINS)
        self._take(counts, maximum)

    def _take(self, counts: Tensor, maximum: Tensor) -> None:
        if self.counts is None or self.maximum is None:
            self.counts, self.maximum = counts, maximum
        else:
            self.counts = self.counts + counts.to(self.counts.device)
            self.maximum = torch.maximum(self.maximum, maximum.to(self.maximum.device))

    def _merge(self, other: Observer) -> None:
        assert isinstance(other, Histogram)
        assert other.counts is not None
        assert other.maximum is not None
        self._take(other.counts, other.maximum)

    def _seen(self) -> tuple[Tensor, float]:
        if self.counts is None or self.maximum is None:
            raise CalibrationError("found no values at a site; expected at least one token of calibration data")
        return self.counts.cpu(), float(self.maximum)

    def quantile(self, p: float) -> float:
        """The p-quantile of the magnitudes as torch.quantile defines it (linear), to 2^-11 (0.049%) of itself.

        Args:
            p: in [0, 1].
        """
        counts, maximum = self._seen()
        total = counts.cumsum(0)
        rank = p * (int(total[-1]) - 1)
        below, above = math.floor(rank), math.ceil(rank)
        low = self._order_statistic(below, counts=counts, total=total, maximum=maximum)
        high = self._order_statistic(above, counts=counts, total=total, maximum=maximum)
        return low + (rank - below) * (high - low)

    @staticmethod
    def _order_statistic(rank: int, *, counts: Tensor, total: Tensor, maximum: float) -> float:
        """The magnitude of that rank, counted from 0; values are taken to lie evenly within a bin."""
        if rank >= int(total[-1]) - 1:
            return maximum
        found = int(torch.searchsorted(total, rank, right=True))
        if found == 0:
            return 0.0
        edges = _edges()
        low, high = float(edges[found]), float(edges[found + 1])
        inside = (rank - int(total[found - 1]) + 0.5) / int(counts[found])
        return min(low + inside * (high - low), maximum)

    def octav(self, bits: int) -> float:
        """The magnitude of clipping with the least mean square error of quantization to that many bits.

        The fixed point of OCTAV (Sakr et al. 2022, eq. 8), by Newton's iteration over the bins' centres:
        a <- E[|x| 1(|x| > a)] / (4^-bits / 3 · E[1(0 < |x| <= a)] + E[1(|x| > a)]).
        """
        counts, maximum = self._seen()
        edges = _edges()
        weights = counts[1:].to(torch.float64)
        centres = (edges[1:-1] + edges[2:]) / 2
        # Entry i sums over the bins from i on.
        number = torch.cat([weights.flip(0).cumsum(0).flip(0), weights.new_zeros(1)])
        mass = torch.cat([(weights * centres).flip(0).cumsum(0).flip(0), weights.new_zeros(1)])
        nonzero = float(number[0])
        if nonzero == 0:
            return maximum
        a = float(mass[0]) / nonzero
        for _ in range(100):
            first = int(torch.searchsorted(centres, a, right=True))
            beyond = float(number[first])
            following = float(mass[first]) / (4.0**-bits / 3 * (nonzero - beyond) + beyond)
            if abs(following - a) <= 2.0**-_MANTISSA_BITS * a:
                return min(following, maximum)
            # Without values beyond a the iteration would fall to zero: the optimum lies under the maximum.
            a = following if following > 0 else maximum * (1 - 2.0**-_MANTISSA_BITS)
        return min(a, maximum)

    def clipped_share(self, alpha: float) -> float:
        """The share of the magnitudes beyond alpha, in [0, 1]; exactly 0 from the largest magnitude on."""
        counts, maximum = self._seen()
        if alpha >= maximum:
            return 0.0
        edges = _edges()
        found = max(int(torch.searchsorted(edges, alpha, right=True)) - 1, 0)
        low, high = float(edges[found]), float(edges[found + 1])
        inside = int(counts[found]) * (high - alpha) / (high - low) if found else 0.0
        return (int(counts[found + 1 :].sum()) + inside) / int(counts.sum())

    def _scalar(self, value: float) -> Tensor:
        assert self.maximum is not None
        return torch.tensor(value, device=self.maximum.device)

    def _alpha(self) -> Tensor:
        assert self.maximum is not None
        return self.maximum

    def clipped(self) -> float:
        """The share of the magnitudes beyond alpha(), to the resolution of a bin."""
        return self.clipped_share(float(self.alpha()))


@lru_cache(maxsize=1)
def _edges() -> Tensor:
    """float64 (BINS + 1,): bin i holds the magnitudes in [edges[i], edges[i + 1])."""
    bits = (torch.arange(BINS, dtype=torch.int32) + 1 + _OFFSET) << _SHIFT
    return torch.cat([torch.zeros(1, dtype=torch.float64), bits.view(torch.float32).to(torch.float64)])


class Percentile(Histogram):
    """A percentile of the magnitudes over a whole site, from a histogram."""

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.percentile = percentile

    def _alpha(self) -> Tensor:
        return self._scalar(self.quantile(self.percentile))

    def _settings(self) -> tuple[object, ...]:
        return (self.percentile,)


class Octav(Histogram):
    """The magnitude of clipping with the least mean square error over a whole site, from a histogram."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def _alpha(self) -> Tensor:
        return self._scalar(self.octav(self.bits))

    def _settings(self) -> tuple[object, ...]:
        return (self.bits,)


def _largest(values: Tensor, number: int) -> Tensor:
    """(T, D) -> (<= number, D): the largest values of each channel, descending."""
    return values.T.contiguous().topk(min(number, values.shape[0]), dim=1).values.T.contiguous()


class ChannelPercentile(Observer):
    """A percentile of the magnitudes per channel, exactly: the largest `capacity` magnitudes of each are kept.

    A percentile p of T tokens needs the largest (1 - p)(T - 1) + 1, rounded up. The state is (capacity, D) float32.
    """

    def __init__(self, percentile: float, *, capacity: int = 256) -> None:
        self.percentile = percentile
        self.capacity = capacity
        self.largest: Tensor | None = None  # (<= capacity, D), descending

    def _update(self, values: Tensor) -> None:
        magnitudes = values.to(torch.float32).abs()
        _finite(magnitudes.amax(dim=0))
        self._take(magnitudes)

    def _take(self, magnitudes: Tensor) -> None:
        if self.largest is not None:
            _channels(magnitudes.shape[1], self.largest.shape[1])
            magnitudes = magnitudes.to(self.largest.device)
            if self.largest.shape[0] == self.capacity:
                # Few values of a later batch are among the largest; sorting them alone is several times faster.
                candidates = int((magnitudes > self.largest[-1]).sum(dim=0).amax())
                magnitudes = _largest(magnitudes, candidates)
            magnitudes = torch.cat([self.largest, magnitudes])
        self.largest = _largest(magnitudes, self.capacity)

    def _merge(self, other: Observer) -> None:
        assert isinstance(other, ChannelPercentile)
        assert other.largest is not None
        self._take(other.largest)

    @property
    def least(self) -> float:
        """The lowest quantile that the kept values still tell."""
        return max(0.0, 1 - (self.capacity - 1) / max(self.count - 1, 1))

    def quantile(self, p: float) -> Tensor:
        """float32 (D,): the p-quantile of each channel's magnitudes as torch.quantile defines it (linear), exactly.

        Raises:
            CalibrationError: it needs more of the largest values than are kept, or there were none.
        """
        if self.largest is None:
            raise CalibrationError("found no values at a site; expected at least one token of calibration data")
        # Ranks counted from the top, 0 the largest, with torch.quantile's linear interpolation.
        rank = self.count - 1 - p * (self.count - 1)
        above, below = math.floor(rank), math.ceil(rank)
        if below >= self.largest.shape[0]:
            raise CalibrationError(
                f"found percentile {p} per channel over {self.count} tokens, which needs the largest "
                f"{below + 1} values of each channel; expected at most {self.capacity}: take a percentile of at least "
                f"{math.ceil(self.least * 1e6) / 1e6:.6f}, fewer samples, or granularity 'tensor'"
            )
        return torch.lerp(self.largest[above], self.largest[below], rank - above)

    def _alpha(self) -> Tensor:
        return self.quantile(self.percentile)

    def clipped(self) -> float:
        """The share of the magnitudes beyond their channel's alpha(), exactly."""
        alpha = self.alpha()
        assert self.largest is not None
        return int((self.largest > alpha).sum()) / (self.count * self.largest.shape[1])

    def _settings(self) -> tuple[object, ...]:
        return (self.percentile, self.capacity)


def make_observer(spec: QuantSpec) -> Observer:
    """The observer that a spec asks for.

    Raises:
        RecipeError: the spec's scales are found at run time, so that there is nothing to observe.
    """
    if spec.granularity == "token":
        raise RecipeError("found granularity 'token', with scales found at run time; expected 'tensor' or 'channel'")
    per_channel = spec.granularity == "channel"
    if spec.observer == "percentile":
        assert spec.percentile is not None
        return ChannelPercentile(spec.percentile) if per_channel else Percentile(spec.percentile)
    if spec.observer == "octav":
        return Octav(spec.bits)
    return AbsMax(per_channel=per_channel)
