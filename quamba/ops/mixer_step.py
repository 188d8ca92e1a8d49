"""mixer_step: one token per sequence through a whole block whose sites are all static int8, in one call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quamba.ops.block import BLOCK_SCHEMA, packed
from quamba.ops.causal_conv1d import causal_conv1d_step_cpu, causal_conv1d_step_reference
from quamba.ops.cpu.linear import linear_cpu
from quamba.ops.cpu.mixer_step import mixer_step_native
from quamba.ops.cpu.selective_scan import selective_scan_step_cpu
from quamba.ops.hadamard_quant import hadamard_quant_cpu, hadamard_quant_reference
from quamba.ops.linear import linear_reference
from quamba.ops.registry import register
from quamba.ops.rms_norm_quant import rms_norm_quant_cpu, rms_norm_quant_reference
from quamba.ops.selective_scan import selective_scan_step_reference


@dataclass(frozen=True)
class Parts:
    """The ops that a block is made of, as one device computes them.

    Attributes:
        rms_norm_quant, linear, hadamard_quant: the ops.
        convolve: of x0 and its scale, weight, scale and bias, out_scale, out_dtype, and the state.
        scan: as selective_scan or its step.
    """

    rms_norm_quant: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    hadamard_quant: Callable[..., Tensor]
    convolve: Callable[..., Tensor]
    scan: Callable[..., Tensor]


_REFERENCES = Parts(
    rms_norm_quant=rms_norm_quant_reference,
    linear=linear_reference,
    hadamard_quant=hadamard_quant_reference,
    convolve=causal_conv1d_step_reference,
    scan=selective_scan_step_reference,
)
_CPU = Parts(
    rms_norm_quant=rms_norm_quant_cpu,
    linear=linear_cpu,
    hadamard_quant=hadamard_quant_cpu,
    convolve=causal_conv1d_step_cpu,
    scan=selective_scan_step_cpu,
)


def composed(
    parts: Parts,
    wide_dtype: torch.dtype,
    hidden: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    u_scale: Tensor,
    in_weight: Tensor,
    in_weight_scale: Tensor,
    in_bias: Tensor | None,
    xz_scale: Tensor,
    conv_weight: Tensor,
    conv_weight_scale: Tensor,
    conv_bias: Tensor | None,
    x_scale: Tensor,
    x_weight: Tensor,
    x_weight_scale: Tensor,
    x_in_scale: Tensor,
    x_scan_scale: Tensor,
    d_norm_weight: Tensor | None,
    B_norm_weight: Tensor | None,
    C_norm_weight: Tensor | None,
    dbc_eps: float | None,
    dbc_scale: Tensor,
    dt_weight: Tensor,
    dt_weight_scale: Tensor,
    dt_scale: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    rotate: bool,
    g_scale: Tensor,
    out_weight: Tensor,
    out_weight_scale: Tensor,
    out_bias: Tensor | None,
    residual: bool,
    out_dtype: torch.dtype,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
) -> Tensor:
    """The block, op by op; wide_dtype: of what stays float between two ops. All else as for `mixer_step_reference`."""
    inner, size = A.shape
    sizes = [dt_weight.shape[1], size, size]
    int8 = torch.int8

    u = parts.rms_norm_quant(hidden, norm_weight, u_scale, norm_eps)
    xz = parts.linear(u, u_scale, in_weight, in_weight_scale, in_bias, None, xz_scale, int8)
    x0, z = torch.split(xz, inner, dim=-1)
    x0_scale, z_scale = torch.split(xz_scale, inner)
    x = parts.convolve(x0, x0_scale, conv_weight, conv_weight_scale, conv_bias, x_scale, int8, conv_state)

    d_scale, B_scale, C_scale = torch.split(dbc_scale, sizes)
    x_args = (x, x_in_scale, x_weight, x_weight_scale, None, None)
    if dbc_eps is None:
        d, B, C = torch.split(parts.linear(*x_args, dbc_scale, int8), sizes, dim=-1)
    else:
        d, B, C = torch.split(parts.linear(*x_args, None, wide_dtype), sizes, dim=-1)
        d = parts.rms_norm_quant(d, d_norm_weight, d_scale, dbc_eps)
        B = parts.rms_norm_quant(B, B_norm_weight, B_scale, dbc_eps)
        C = parts.rms_norm_quant(C, C_norm_weight, C_scale, dbc_eps)
    dt_dtype = wide_dtype if dt_scale is None else int8
    dt = parts.linear(d, d_scale[0], dt_weight, dt_weight_scale, None, None, dt_scale, dt_dtype)

    scan = (x, x_scan_scale, dt, dt_scale, dt_bias, A, B, B_scale, C, C_scale, D, z, z_scale)
    if rotate:
        g = parts.hadamard_quant(parts.scan(*scan, None, wide_dtype, ssm_state), g_scale)
    else:
        g = parts.scan(*scan, g_scale, int8, ssm_state)
    left = hidden if residual else None
    return parts.linear(g, g_scale, out_weight, out_weight_scale, out_bias, left, None, out_dtype)


def mixer_step_reference(hidden: Tensor, *arguments: Any) -> Tensor:
    """One token through norm, W_in, convolution, W_x, W_dt, scan, gate and W_out, every product in int8.

    The meaning is the composition of the ops' references, `composed` above, which also names the arguments.

    Args:
        hidden: (B, E) any float dtype.
        norm_weight, norm_eps: (E,) any float dtype, and the constant of the block's RMSNorm.
        u_scale: float32 ().
        in_weight, in_weight_scale, in_bias: int8 (2D, E), float32 () or (2D,), any float dtype (2D,) or None.
        xz_scale: float32 (2D,): x0's, then z's.
        conv_weight, conv_weight_scale, conv_bias: int8 (D, K), float32 () or (D,), any float dtype (D,) or None.
        x_scale: float32 () or (D,): with it x leaves the convolution.
        x_weight, x_weight_scale: int8 (R + 2N, D), float32 () or (R + 2N,).
        x_in_scale: float32 (): x's for W_x, ones where x's scales are in the columns of W_x.
        x_scan_scale: float32 () or (D,): x's for the scan.
        d_norm_weight, B_norm_weight, C_norm_weight: (R,), (N,), (N,) any float dtype, or None.
        dbc_eps: of the RMSNorms on d, B and C, or None where they have none.
        dbc_scale: float32 (R + 2N,): d's (all equal), B's and C's.
        dt_weight, dt_weight_scale: int8 (D, R), float32 () or (D,).
        dt_scale: float32 () or (D,), or None where dt stays float.
        dt_bias, D: (D,) any float dtype.
        A: float32 (D, N), negative.
        rotate: whether the gated output goes through the Hadamard transform.
        g_scale: float32 ().
        out_weight, out_weight_scale, out_bias: int8 (E, D), float32 () or (E,), any float dtype (E,) or None.
        residual: whether hidden is added to the result.
        out_dtype: float dtype of the result.
        conv_state: int8 (B, D, K), the last K inputs of the convolution, newest last; shifted in place.
        ssm_state: float32 (B, D, N), updated in place.

    Returns:
        (B, E) of out_dtype.
    """
    return composed(_REFERENCES, torch.float32, hidden, *arguments)


def mixer_step_fake(hidden: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(hidden, dtype=arguments[-3], memory_format=torch.contiguous_format)


def mixer_step_cpu(hidden: Tensor, *arguments: Any) -> Tensor:
    """Native where that serves these tensors, else the ops' CPU implementations one after the other."""
    out = mixer_step_native(hidden, *arguments)
    return composed(_CPU, torch.float32, hidden, *arguments) if out is None else out


def mixer_step_cuda(hidden: Tensor, *arguments: Any) -> Tensor:
    """A stack of one block."""
    *block, out_dtype, conv_state, ssm_state = arguments
    lists = packed([tuple(block)])
    out: Tensor = torch.ops.quamba.mixers_step.default(hidden, *lists, out_dtype, [conv_state], [ssm_state])
    return out


mixer_step = register(
    "mixer_step",
    f"({BLOCK_SCHEMA}, ScalarType out_dtype, Tensor(a!) conv_state, Tensor(b!) ssm_state) -> Tensor",
    reference=mixer_step_reference,
    fake=mixer_step_fake,
    cpu=mixer_step_cpu,
    cuda=mixer_step_cuda,
)
