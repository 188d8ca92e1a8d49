"""Observers: what calibration keeps of the values at one site, and the clipping magnitude it gives.

Each is a small class with bounded state, fed once per batch, and mergeable: the statistics of two shards of the data
merge into those of one pass over both.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from quamba import histogram
from quamba.errors import CalibrationError, RecipeError
from quamba.recipe import QuantSpec


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
    """How often each magnitude occurs over a whole site (quamba.histogram); alpha() is the largest one.

    Every value is known to 2^-11 (0.049%) of itself, the largest exactly. The state is histogram.BINS int64 counts
    (1.3 MB), whatever the amount of data.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self.maximum: Tensor | None = None

    def _update(self, values: Tensor) -> None:
        maximum = _magnitudes_max(values)
        if bool(maximum >= histogram.LIMIT):
            raise CalibrationError(
                f"found a value of magnitude {float(maximum):.3g}; expected less than {histogram.LIMIT:.3g}; "
                "check the float model on the calibration data"
            )
        self._take(histogram.count(values), maximum)

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
        """The p-quantile of the magnitudes, as torch.quantile defines it (linear), to 2^-11 (0.049%) of itself."""
        return histogram.quantile(*self._seen(), p)

    def octav(self, bits: int) -> float:
        """The magnitude of clipping with the least mean square error of quantization to that many bits."""
        return histogram.octav(*self._seen(), bits)

    def clipped_share(self, alpha: float) -> float:
        """The share of the magnitudes beyond alpha, in [0, 1]; exactly 0 from the largest magnitude on."""
        return histogram.share_beyond(*self._seen(), alpha)

    def _scalar(self, value: float) -> Tensor:
        assert self.maximum is not None
        return torch.tensor(value, device=self.maximum.device)

    def _alpha(self) -> Tensor:
        assert self.maximum is not None
        return self.maximum

    def clipped(self) -> float:
        """The share of the magnitudes beyond alpha(), to the resolution of a bin."""
        return self.clipped_share(float(self.alpha()))


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
