"""Histograms of magnitudes in fixed logarithmic bins, as plain tensors of counts: exact to merge, by addition.

The bins come straight from the bits of the float32 magnitudes: the exponent and the top 11 bits of the mantissa. There
are 2^11 equal ones in each binade from 2^-40 to 2^40, so a bin is at most 2^-11 (0.049%) wide relative to the values
in it. Bin 0 takes zero and what is smaller than 2^-40. Beside the counts the largest magnitude is kept exactly.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

_MANTISSA_BITS = 11
_LOW, _HIGH = -40, 40
_SHIFT = 23 - _MANTISSA_BITS
_OFFSET = ((127 + _LOW) << _MANTISSA_BITS) - 1
RESOLUTION = 2.0**-_MANTISSA_BITS
LIMIT = 2.0**_HIGH
BINS = ((_HIGH - _LOW) << _MANTISSA_BITS) + 1
# Values binned at a time: the index of a chunk stays in the cache.
_CHUNK = 1 << 20


@lru_cache(maxsize=1)
def edges() -> Tensor:
    """float64 (BINS + 1,): bin i holds the magnitudes in [edges[i], edges[i + 1])."""
    bits = (torch.arange(BINS, dtype=torch.int32) + 1 + _OFFSET) << _SHIFT
    return torch.cat([torch.zeros(1, dtype=torch.float64), bits.view(torch.float32).to(torch.float64)])


def count(values: Tensor) -> Tensor:
    """Count magnitudes.

    Args:
        values: any shape, any float dtype, finite, magnitudes below LIMIT.

    Returns:
        int64 (BINS,) on the device of the values.
    """
    counts = torch.zeros(BINS, dtype=torch.int64, device=values.device)
    flat = values.flatten()
    for start in range(0, flat.numel(), _CHUNK):
        index = flat[start : start + _CHUNK].to(torch.float32).abs().view(torch.int32)
        index = index.bitwise_right_shift(_SHIFT).sub_(_OFFSET).clamp_(min=0)
        counts += torch.bincount(index, minlength=BINS)
    return counts


def quantile(counts: Tensor, maximum: float, p: float) -> float:
    """The p-quantile of the magnitudes, p in [0, 1], as torch.quantile defines it (linear), to RESOLUTION."""
    total = counts.cumsum(0)
    rank = p * (int(total[-1]) - 1)
    below, above = math.floor(rank), math.ceil(rank)
    low, high = (_order_statistic(counts, total, maximum, rank=whole) for whole in (below, above))
    return low + (rank - below) * (high - low)


def _order_statistic(counts: Tensor, total: Tensor, maximum: float, *, rank: int) -> float:
    """The magnitude of that rank, counted from 0; values are taken to lie evenly within a bin."""
    if rank >= int(total[-1]) - 1:
        return maximum
    found = int(torch.searchsorted(total, rank, right=True))
    if found == 0:
        return 0.0
    low, high = edges()[found : found + 2].tolist()
    inside = (rank - int(total[found - 1]) + 0.5) / int(counts[found])
    return float(min(low + inside * (high - low), maximum))


def octav(counts: Tensor, maximum: float, bits: int) -> float:
    """The magnitude of clipping with the least mean square error of quantization to that many bits.

    The fixed point of OCTAV (Sakr et al. 2022), by Newton's iteration over the bins' centres:
    a <- E[|x| 1(|x| > a)] / (4^-bits / 3 · E[1(0 < |x| <= a)] + E[1(|x| > a)]).
    """
    weights = counts[1:].to(torch.float64)
    centres = (edges()[1:-1] + edges()[2:]) / 2
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
        if abs(following - a) <= RESOLUTION * a:
            return min(following, maximum)
        # Without values beyond a the iteration would fall to zero: the optimum lies under the maximum.
        a = following if following > 0 else maximum * (1 - RESOLUTION)
    return min(a, maximum)


def share_beyond(counts: Tensor, maximum: float, alpha: float) -> float:
    """The share of the magnitudes beyond alpha, in [0, 1]; exactly 0 from the largest magnitude on."""
    if alpha >= maximum:
        return 0.0
    found = max(int(torch.searchsorted(edges(), alpha, right=True)) - 1, 0)
    low, high = edges()[found : found + 2].tolist()
    inside = int(counts[found]) * (high - alpha) / (high - low) if found else 0.0
    return float((int(counts[found + 1 :].sum()) + inside) / int(counts.sum()))
