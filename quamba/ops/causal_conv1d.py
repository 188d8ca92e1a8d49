"""causal_conv1d: depthwise causal convolution + SiLU, int8 or float in and out, with its decode step."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba import numerics
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
    cpu=causal_conv1d_reference,
)
causal_conv1d_step = register(
    "causal_conv1d_step",
    _COMMON + "Tensor(a!) conv_state) -> Tensor",
    reference=causal_conv1d_step_reference,
    fake=causal_conv1d_step_fake,
    cpu=causal_conv1d_step_reference,
)
