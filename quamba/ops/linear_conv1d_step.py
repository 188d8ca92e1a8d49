"""linear_conv1d_step: W_in and the convolution's step behind it, for one token of each sequence."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quamba.ops.causal_conv1d import causal_conv1d_step_cpu, causal_conv1d_step_reference
from quamba.ops.cpu.linear import linear_cpu
from quamba.ops.linear import linear_reference
from quamba.ops.registry import register


def _composed(product: Callable[..., Tensor], conv_step: Callable[..., Tensor], *arguments: Any) -> tuple[Any, Tensor]:
    x, x_scale, weight, weight_scale, bias, out_scale, conv_weight, *rest = arguments
    conv_weight_scale, conv_bias, conv_out_scale, conv_state = rest
    channels = conv_weight.shape[0]
    xz = product(x, x_scale, weight, weight_scale, bias, None, out_scale, torch.int8)
    x0, z = torch.split(xz, channels, dim=-1)
    x0_scale = out_scale[:channels] if out_scale.dim() else out_scale
    conv = (conv_weight, conv_weight_scale, conv_bias, conv_out_scale, torch.int8, conv_state)
    return conv_step(x0, x0_scale, *conv), z


def linear_conv1d_step_reference(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """`linear` to [x0, z], then `causal_conv1d_step` of x0.

    Args:
        x, x_scale: int8 (B, E), float32 () or (B, 1).
        weight, weight_scale, bias: int8 (2D, E), float32 () or (2D,), any float dtype (2D,) or None.
        out_scale: float32 () or (2D,): x0's, then z's.
        conv_weight, conv_weight_scale, conv_bias: (D, K) int8 with float32 () or (D,), or float with None; any float
            dtype (D,) or None.
        conv_out_scale: float32 () or (D,).
        conv_state: int8 (B, D, K), the last K inputs, newest last; shifted in place.

    Returns:
        The convolution's result and z, int8 (B, D); z with any stride between rows.
    """
    return _composed(linear_reference, causal_conv1d_step_reference, x, *arguments)


def linear_conv1d_step_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    channels = arguments[5].shape[0]
    wide = x.new_empty((x.shape[0], 2 * channels), dtype=torch.int8)
    return x.new_empty((x.shape[0], channels), dtype=torch.int8), wide[:, channels:]


def linear_conv1d_step_cpu(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """See `linear_conv1d_step_reference`."""
    return _composed(linear_cpu, causal_conv1d_step_cpu, x, *arguments)


linear_conv1d_step = register(
    "linear_conv1d_step",
    "(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor out_scale,"
    " Tensor conv_weight, Tensor? conv_weight_scale, Tensor? conv_bias, Tensor conv_out_scale, Tensor(a!) conv_state)"
    " -> (Tensor, Tensor)",
    reference=linear_conv1d_step_reference,
    fake=linear_conv1d_step_fake,
    cpu=linear_conv1d_step_cpu,
)
