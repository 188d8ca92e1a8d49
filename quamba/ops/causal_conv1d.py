"""causal_conv1d: depthwise causal convolution + SiLU, int8 or float in and out, with its decode step."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba import numerics
from quamba.ops import checks
from quamba.ops.cpu.causal_conv1d import causal_conv1d_native
from quamba.ops.registry import register


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
    acc = F.conv1d(
        full[:, 1:].transpose(1, 2).to(wide),
        weight.to(wide)[:, None, :],
        groups=weight.shape[0],
    ).transpose(1, 2)
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


def _check(
    op: str,
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    out_scale: Tensor | None,
    out_dtype: torch.dtype,
    conv_state: Tensor | None,
) -> None:
    """The checks that prefill and step share; x (B, ..., D)."""
    channels = x.shape[-1]
    checks.dtype(op, "x", x, checks.INT8_OR_FLOAT)
    checks.dtype(op, "weight", weight, checks.INT8_OR_FLOAT)
    checks.dims(op, "weight", weight, 2)
    checks.shape(op, "weight", weight, (channels, weight.shape[1]))
    checks.scale(op, "x_scale", x_scale, channels)
    checks.scale(op, "weight_scale", weight_scale, channels)
    checks.scale(op, "out_scale", out_scale, channels)
    checks.vector(op, "bias", bias, channels)
    checks.output(op, out_scale, out_dtype)
    if conv_state is not None:
        checks.dtype(op, "conv_state", conv_state, frozenset((x.dtype,)))
        checks.shape(op, "conv_state", conv_state, (x.shape[0], *weight.shape))


def _finish(
    acc: Tensor,
    scales: tuple[Tensor | None, Tensor | None],
    bias: Tensor | None,
    mask: Tensor | None,
    out_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Scale, bias, SiLU, mask and quantize the float32 sums (..., D), which are overwritten."""
    for scale in scales:
        if scale is not None:
            acc.mul_(scale)
    if bias is not None:
        acc.add_(bias)
    F.silu(acc, inplace=True)
    if mask is not None:
        acc.mul_(mask.unsqueeze(-1))
    return acc.to(out_dtype) if out_scale is None else numerics.to_int8_(acc.div_(out_scale))


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
    checks.dims("causal_conv1d", "x", x, 3)
    _check("causal_conv1d", x, x_scale, weight, weight_scale, bias, out_scale, out_dtype, conv_state)
    batch, length, channels = x.shape
    width = weight.shape[1]
    if mask is not None:
        checks.shape("causal_conv1d", "mask", mask, (batch, length))
    out = causal_conv1d_native(
        x, x_scale, weight, weight_scale, bias, out_scale, out_dtype, mask, conv_state
    )
    if out is not None:
        return out
    if mask is not None:
        mask = mask.to(torch.bool)
        x = x.masked_fill(mask.logical_not().unsqueeze(-1), 0)
    context = x.new_zeros(batch, width, channels) if conv_state is None else conv_state.transpose(1, 2)
    full = torch.cat([context, x], dim=1)
    if conv_state is not None:
        conv_state.copy_(full[:, length:].transpose(1, 2))
    # K multiply-adds over the whole tensor, channels contiguous; the sums of int8 products are exact.
    inputs, taps = full.float(), weight.t().float()
    acc = inputs[:, 1 : 1 + length] * taps[0]
    for k in range(1, width):
        acc.addcmul_(inputs[:, 1 + k : 1 + k + length], taps[k])
    return _finish(acc, (x_scale, weight_scale), bias, mask, out_scale, out_dtype)


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
    checks.dims("causal_conv1d_step", "x", x, 2)
    _check("causal_conv1d_step", x, x_scale, weight, weight_scale, bias, out_scale, out_dtype, conv_state)
    window = torch.cat([conv_state.narrow(2, 1, conv_state.shape[2] - 1), x.unsqueeze(2)], dim=2)
    conv_state.copy_(window)
    acc = (window.float() * weight).sum(dim=2)
    return _finish(acc, (x_scale, weight_scale), bias, None, out_scale, out_dtype)


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
    cpu=causal_conv1d_cpu,
)
causal_conv1d_step = register(
    "causal_conv1d_step",
    _COMMON + "Tensor(a!) conv_state) -> Tensor",
    reference=causal_conv1d_step_reference,
    fake=causal_conv1d_step_fake,
    cpu=causal_conv1d_step_cpu,
)
