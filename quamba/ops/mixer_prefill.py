"""mixer_prefill: whole sequences through a block whose sites are all static int8, in one call."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quamba.ops.block import arguments_of
from quamba.ops.causal_conv1d import causal_conv1d, causal_conv1d_reference
from quamba.ops.cpu.linear import linear_cpu
from quamba.ops.hadamard_quant import hadamard_quant_cpu, hadamard_quant_reference
from quamba.ops.linear import linear_reference
from quamba.ops.mixer_step import Parts, composed
from quamba.ops.registry import register
from quamba.ops.rms_norm_quant import rms_norm_quant_cpu, rms_norm_quant_reference
from quamba.ops.selective_scan import selective_scan, selective_scan_reference

# The convolution takes the mask before the state.
_REFERENCES = Parts(
    rms_norm_quant=rms_norm_quant_reference,
    linear=linear_reference,
    hadamard_quant=hadamard_quant_reference,
    convolve=causal_conv1d_reference,
    scan=selective_scan_reference,
)
_CPU = Parts(
    rms_norm_quant=rms_norm_quant_cpu,
    linear=linear_cpu,
    hadamard_quant=hadamard_quant_cpu,
    convolve=causal_conv1d.cpu,
    scan=selective_scan.cpu,
)


def _composed(
    parts: Parts,
    hidden: Tensor,
    block: int,
    wide_dtype: torch.dtype,
    out_dtype: torch.dtype,
    mask: Tensor | None,
    *states: Tensor | None,
) -> Tensor:
    def convolve(*arguments: Any) -> Tensor:
        *others, state = arguments
        out: Tensor = parts.convolve(*others, mask, state)
        return out

    arguments = [*arguments_of(block), out_dtype, *states]
    return composed(replace(parts, convolve=convolve), wide_dtype, hidden, *arguments)


def mixer_prefill_reference(
    hidden: Tensor,
    block: int,
    wide_dtype: torch.dtype,
    out_dtype: torch.dtype,
    mask: Tensor | None,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
) -> Tensor:
    """Sequences through norm, W_in, convolution, W_x, W_dt, scan, gate and W_out, every product in int8.

    The meaning is the composition of the ops' references, `quamba.ops.mixer_step.composed`, with the ops of sequences
    for the convolution and the scan.

    Args:
        hidden: (B, L, E) any float dtype.
        block: the number of a `quamba.ops.Block` that is alive.
        wide_dtype: float dtype of what stays float between two ops: the rotation's input, dt without a scale, and d, B
            and C before their norms.
        out_dtype: float dtype of the result.
        mask: (B, L), False or 0 at padding, as for `causal_conv1d`; or None.
        conv_state: int8 (B, D, K), the last K inputs of the convolution, newest last: the left context, overwritten;
            or None for a zero context.
        ssm_state: float32 (B, D, N): the initial state, overwritten with the final one; None for a zero start.

    Returns:
        (B, L, E) of out_dtype.

    Raises:
        ValueError: there is no block of that number.
    """
    return _composed(_REFERENCES, hidden, block, wide_dtype, out_dtype, mask, conv_state, ssm_state)


def mixer_prefill_fake(
    hidden: Tensor,
    block: int,
    wide_dtype: torch.dtype,
    out_dtype: torch.dtype,
    mask: Tensor | None,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
) -> Tensor:
    return torch.empty_like(hidden, dtype=out_dtype, memory_format=torch.contiguous_format)


def mixer_prefill_cpu(
    hidden: Tensor,
    block: int,
    wide_dtype: torch.dtype,
    out_dtype: torch.dtype,
    mask: Tensor | None,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
) -> Tensor:
    """See `mixer_prefill_reference`."""
    return _composed(_CPU, hidden, block, wide_dtype, out_dtype, mask, conv_state, ssm_state)


mixer_prefill = register(
    "mixer_prefill",
    "(Tensor hidden, int block, ScalarType wide_dtype, ScalarType out_dtype, Tensor? mask, Tensor(a!)? conv_state,"
    " Tensor(b!)? ssm_state) -> Tensor",
    reference=mixer_prefill_reference,
    fake=mixer_prefill_fake,
    cpu=mixer_prefill_cpu,
)
