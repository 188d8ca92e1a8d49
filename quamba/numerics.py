"""Rounding, clamping and scales: the only place in the package that knows them.

Symmetric INT8 (design: q(v, s) = clamp(round_half_even(v / s), -128, 127), v ~ s * q), with the scale
s = alpha / 127, where alpha is the largest magnitude that is represented without clipping. For simulations the same
with fewer bits: clamp to [-2^(bits - 1), 2^(bits - 1) - 1], s = alpha / (2^(bits - 1) - 1).
"""

import torch
from torch import Tensor

from quamba.errors import CalibrationError

QMIN = -128
QMAX = 127
# The smallest alpha: a site that is always zero still needs a positive, normal scale.
ALPHA_FLOOR = 1e-8
# Elements of a weight that are quantized at a time.
_PIECE = 1 << 22


def scale_from_alpha(alpha: Tensor, *, bits: int = 8) -> Tensor:
    """Turn clipping magnitudes into scales.

    Args:
        alpha: any shape, any float dtype, >= 0.
        bits: per value.

    Returns:
        float32 scales alpha / 127 (for 8 bits) of the same shape, at least ALPHA_FLOOR / 127.

    Raises:
        CalibrationError: alpha is NaN, infinite or negative.
    """
    alpha = alpha.detach().to(torch.float32)
    if not bool(torch.isfinite(alpha).all()) or bool((alpha < 0).any()):
        raise CalibrationError(
            f"found a clipping magnitude that is NaN, infinite or negative ({alpha.flatten()[:4].tolist()} ...); "
            "expected finite values >= 0; check the calibration data and the float model for NaN"
        )
    return alpha.clamp(min=ALPHA_FLOOR) / _largest(bits)


def _largest(bits: int) -> int:
    return QMAX >> (8 - bits)


def simulate(x: Tensor, scale: Tensor, *, bits: int) -> Tensor:
    """Round x to that many bits and return it in float32: scale * clamp(round_half_even(x / scale)).

    Args:
        x: (..., D) any float dtype.
        scale: as for `quantize`.
        bits: per value, 2 to 8.
    """
    largest = _largest(bits)
    return (x.float() / scale).round_().clamp_(-largest - 1, largest).mul_(scale)


def simulate_weight(weight: Tensor, *, per_channel: bool, bits: int) -> Tensor:
    """A weight (N, ...) rounded to that many bits with absmax scales, per row or for all, in float32."""
    wide = weight.detach().float()
    alpha = wide.abs().flatten(1).amax(dim=1).reshape(-1, *[1] * (wide.dim() - 1))
    return simulate(wide, scale_from_alpha(alpha if per_channel else alpha.amax(), bits=bits), bits=bits)


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Quantize to int8: clamp(round_half_even(x / scale), -128, 127), in float32.

    Args:
        x: (..., D) any float dtype.
        scale: float32, broadcastable to x: () per tensor, (D,) per channel, (..., 1) per token.

    Returns:
        int8 of x's shape.
    """
    return to_int8_(x.float() / scale)


def to_int8_(x: Tensor) -> Tensor:
    """Round and clamp values that are already divided by their scale; x is float32 and is overwritten.

    Returns:
        int8 of x's shape.
    """
    # .char(), not .to(torch.int8): half the overhead, which counts in a decode step.
    return x.round_().clamp_(QMIN, QMAX).char()


def finish_(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """An op's float32 result, which is given up, as what the caller asked for.

    Returns:
        int8 quantized with `scale`, or, where it is None, x in the float `dtype`.
    """
    if scale is not None:
        return to_int8_(x.div_(scale))
    # Asking first: a conversion that does nothing costs as much as an addition in a decode step.
    return x if dtype is torch.float32 else x.to(dtype)


def dequantize(q: Tensor, scale: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return q * scale in `dtype`, computed in float32 (float64 for float64); with scale None, q itself in `dtype`."""
    x = q.to(torch.promote_types(q.dtype, torch.float32))
    if scale is not None:
        x = x * scale if x is q else x.mul_(scale)
    return x if dtype is torch.float32 else x.to(dtype)


def token_scale(x: Tensor, *, bits: int = 8) -> Tensor:
    """Dynamic per-token scales: max |x| over the last dimension / 127 (for 8 bits), as float32 (..., 1)."""
    alpha = x.detach().abs().amax(dim=-1, keepdim=True).to(torch.float32)
    return alpha.clamp(min=ALPHA_FLOOR) / _largest(bits)


def quantize_weight(weight: Tensor, *, per_channel: bool, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize a weight matrix with absmax scales.

    Args:
        weight: (N, ...) any float dtype; one scale per row (output channel) or one for all.
        per_channel: True for scales of shape (N,), False for ().
        columns: float32 factors of the last dimension, taken in before the rounding, or None.

    Returns:
        (int8 weight of the same shape, float32 scales).
    """
    weight = weight.detach()
    columns = None if columns is None else columns.to(weight.device)

    def taken(piece: slice) -> Tensor:
        return weight[piece] if columns is None else weight[piece].to(torch.float32) * columns

    # In pieces: the float32 copies of an embedding would otherwise be the largest tensors of all.
    rows = max(1, _PIECE // max(1, weight[0].numel())) if len(weight) else 1
    pieces = [slice(start, start + rows) for start in range(0, len(weight), rows)]
    alpha = torch.cat([taken(piece).abs().flatten(1).amax(dim=1) for piece in pieces])
    scale = scale_from_alpha(alpha if per_channel else alpha.amax())
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for piece in pieces:
        own = scale[piece].reshape(-1, *[1] * (weight.dim() - 1)) if per_channel else scale
        q[piece] = quantize(taken(piece), own)
    return q, scale


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB: 10 log10(sum r^2 / sum (r - a)^2)."""
    reference = reference.to(torch.float64)
    noise = (reference - approximation.to(torch.float64)).square().sum()
    signal = reference.square().sum()
    return float(10 * torch.log10(signal / noise.clamp(min=1e-300)))
