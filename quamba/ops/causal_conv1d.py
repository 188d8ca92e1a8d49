"""causal_conv1d: depthwise causal convolution + SiLU, int8 or float in and out, with its decode step."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba import numerics
from quamba.ops import checks
from quamba.ops.cache import Derived
from quamba.ops.cpu.causal_conv1d import causal_conv1d_native
from quamba.ops.registry import float64_in, register


def causal_conv1d_reference(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    out_scale: Tensor | None,
    out_dtype: torch.dtype,
    mask: Tensor | None,
    conv_state: Tensor | None,
) -> Tensor:
    """SiLU(sum_k weight[:, k] x[t - K + 1 + k] + bias) per channel, in float32 (float64 for float64 x).

    Args:
        x: (B, L, D) int8 with x_scale, or float without; any strides.
        x_scale: float32 () or (D,), or None.
        weight: (D, K) int8 with weight_scale, or float without.
        weight_scale: float32 () or (D,), or None.
        bias: (D,) any float dtype, or None.
        out_scale: float32 () or (D,) for an int8 result, or None for a float one.
        out_dtype: torch.int8 where out_scale is given, else the float dtype of the result.
        mask: (B, L), False or 0 at padding: read as zero before the convolution, zero after it; or None.
        conv_state: (B, D, K) of x's dtype, the last K inputs, newest last; read as the left context and
            overwritten with the last K (masked) inputs; or None for a zero context.

    Returns:
        (B, L, D) of out_dtype.
    """
    width = weight.shape[1]
    if mask is not None:
        x = torch.where(mask.to(torch.bool)[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))
    context = x.new_zeros(x.shape[0], width, x.shape[2]) if conv_state is None else conv_state.transpose(1, 2)
    full = torch.cat([context, x], dim=1)  # (B, K + L, D)
    wide = torch.promote_types(x.dtype, torch.float32)
    acc = torch.zeros(x.shape, dtype=wide, device=x.device)
    for k in range(width):
        acc = acc + full[:, 1 + k : 1 + k + x.shape[1]].to(wide) * weight[:, k].to(wide)
    for scale in (x_scale, weight_scale):
        acc = acc if scale is None else acc * scale
    if bias is not None:
        acc = acc + bias.to(wide)
    out = F.silu(acc)
    if mask is not None:
        out = out * mask.to(wide)[..., None]
    if conv_state is not None:
        conv_state.copy_(full[:, -width:].transpose(1, 2))
    return out.to(out_dtype) if out_scale is None else numerics.quantize(out, out_scale)


class _Parameters(NamedTuple):
    """What the CPU side derives from the parameters: sum_k taps[k] x[k] * scale + bias, all float32."""

    taps: Tensor  # (D, K)
    scale: Tensor | None  # () or (D,)
    bias: Tensor | None
    ones: Tensor  # (K,)


def _prepare(
    weight: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    out_scale: Tensor | None,
) -> _Parameters:
    checks.dtype("causal_conv1d", "weight", weight, checks.INT8_OR_FLOAT)
    checks.dims("causal_conv1d", "weight", weight, 2)
    channels, width = weight.shape
    checks.scale("causal_conv1d", "x_scale", x_scale, channels)
    checks.scale("causal_conv1d", "weight_scale", weight_scale, channels)
    checks.scale("causal_conv1d", "out_scale", out_scale, channels)
    checks.vector("causal_conv1d", "bias", bias, channels)
    scales = [scale for scale in (x_scale, weight_scale) if scale is not None]
    return _Parameters(
        taps=weight.to(torch.float32, copy=True),
        scale=math.prod(scales[1:], start=scales[0].clone()) if scales else None,
        bias=None if bias is None else bias.to(torch.float32, copy=True),
        ones=torch.ones(width, dtype=torch.float32, device="cpu"),
    )


_parameters = Derived(_prepare)


def _finish(
    acc: Tensor, parameters: _Parameters, mask: Tensor | None, out_scale: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Scale, bias, SiLU, mask and quantize the float32 sums (..., D), which are overwritten."""
    _, scale, bias, _ = parameters
    if scale is None:
        acc = acc if bias is None else acc.add_(bias)
    else:
        acc = acc.mul_(scale) if bias is None else torch.addcmul(bias, acc, scale)
    F.silu(acc, inplace=True)
    if mask is not None:
        acc.mul_(mask.unsqueeze(-1))
    return numerics.finish_(acc, out_scale, out_dtype)


def causal_conv1d_cpu(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    out_scale: Tensor | None,
    out_dtype: torch.dtype,
    mask: Tensor | None,
    conv_state: Tensor | None,
) -> Tensor:
    parameters = _parameters(weight, x_scale, weight_scale, bias, out_scale)
    channels, width = weight.shape
    checks.dims("causal_conv1d", "x", x, 3)
    batch, length, _ = x.shape
    checks.dtype("causal_conv1d", "x", x, checks.INT8_OR_FLOAT)
    checks.shape("causal_conv1d", "x", x, (batch, length, channels))
    checks.output("causal_conv1d", out_scale, out_dtype)
    if mask is not None:
        checks.shape("causal_conv1d", "mask", mask, (batch, length))
        mask = mask.to(torch.bool)
    if conv_state is not None:
        checks.same_dtype("causal_conv1d", "conv_state", conv_state, x)
        checks.shape("causal_conv1d", "conv_state", conv_state, (batch, channels, width))
    native = causal_conv1d_native(x, x_scale, weight, weight_scale, bias, out_scale, out_dtype, mask, conv_state)
    if native is not None:
        return native
    if mask is not None:
        x = x.masked_fill(mask.logical_not().unsqueeze(-1), 0)
    context = x.new_zeros(batch, width, channels) if conv_state is None else conv_state.transpose(1, 2)
    full = torch.cat([context, x], dim=1)
    if conv_state is not None:
        conv_state.copy_(full[:, length:].transpose(1, 2))
    # K multiply-adds over the whole tensor, channels contiguous; the sums of int8 products are exact.
    inputs, taps = full.float(), parameters.taps.t().contiguous()
    acc = inputs[:, 1 : 1 + length] * taps[0]
    for k in range(1, width):
        acc.addcmul_(inputs[:, 1 + k : 1 + k + length], taps[k])
    return _finish(acc, parameters, mask, out_scale, out_dtype)


def causal_conv1d_fake(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    out_scale: Tensor | None,
    out_dtype: torch.dtype,
    mask: Tensor | None,
    conv_state: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape, dtype=out_dtype)


def causal_conv1d_step_reference(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    out_scale: Tensor | None,
    out_dtype: torch.dtype,
    conv_state: Tensor,
) -> Tensor:
    """One token of `causal_conv1d`: x (B, D) -> (B, D); conv_state (B, D, K) is shifted in place."""
    return causal_conv1d_reference(
        x[:, None], x_scale, weight, weight_scale, bias, out_scale, out_dtype, None, conv_state
    )[:, 0].contiguous()


def causal_conv1d_step_cpu(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    out_scale: Tensor | None,
    out_dtype: torch.dtype,
    conv_state: Tensor,
) -> Tensor:
    parameters = _parameters(weight, x_scale, weight_scale, bias, out_scale)
    shape = conv_state.shape
    if x.shape != shape[:2] or shape[1:] != weight.shape:
        checks.dims("causal_conv1d_step", "x", x, 2)
        checks.shape("causal_conv1d_step", "x", x, (x.shape[0], weight.shape[0]))
        checks.shape("causal_conv1d_step", "conv_state", conv_state, (*x.shape, weight.shape[1]))
    checks.dtype("causal_conv1d_step", "x", x, checks.INT8_OR_FLOAT)
    checks.same_dtype("causal_conv1d_step", "conv_state", conv_state, x)
    checks.output("causal_conv1d_step", out_scale, out_dtype)
    # Rolling all elements as one row moves each window by one; what enters at its end is then overwritten.
    window = torch.roll(conv_state, -1)
    window.select(2, -1).copy_(x)
    conv_state.copy_(window)
    acc = torch.matmul(window * parameters.taps, parameters.ones)
    return _finish(acc, parameters, None, out_scale, out_dtype)


def causal_conv1d_step_fake(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    out_scale: Tensor | None,
    out_dtype: torch.dtype,
    conv_state: Tensor,
) -> Tensor:
    return x.new_empty(x.shape, dtype=out_dtype)


_COMMON = (
    "(Tensor x, Tensor? x_scale, Tensor weight, Tensor? weight_scale, Tensor? bias, Tensor? out_scale,"
    " ScalarType out_dtype, "
)
causal_conv1d = register(
    "causal_conv1d",
    _COMMON + "Tensor? mask, Tensor(a!)? conv_state) -> Tensor",
    reference=causal_conv1d_reference,
    fake=causal_conv1d_fake,
    cpu=float64_in(causal_conv1d_reference, causal_conv1d_cpu),
)
causal_conv1d_step = register(
    "causal_conv1d_step",
    _COMMON + "Tensor(a!) conv_state) -> Tensor",
    reference=causal_conv1d_step_reference,
    fake=causal_conv1d_step_fake,
    cpu=float64_in(causal_conv1d_step_reference, causal_conv1d_step_cpu),
)
