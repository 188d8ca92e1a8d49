"""blocks_prefill: whole sequences through a stack of kept blocks whose sites are all static int8, in one call."""

from collections.abc import Sequence
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
    blocks: Sequence[int],
    wide_dtype: torch.dtype,
    out_dtype: torch.dtype,
    mask: Tensor | None,
    *states: Sequence[Tensor],
) -> Tensor:
    counts = [len(of_a_kind) for of_a_kind in states]
    if not blocks or any(count not in (0, len(blocks)) for count in counts):
        raise ValueError(
            f"blocks_prefill: found {len(blocks)} blocks with {counts} states; expected at least one block, and a "
            "state of a kind for each or for none"
        )

    def convolve(*arguments: Any) -> Tensor:
        *others, state = arguments
        out: Tensor = parts.convolve(*others, mask, state)
        return out

    masked = replace(parts, convolve=convolve)
    for i, number in enumerate(blocks):
        arguments = [*arguments_of(number), out_dtype, *(of_a_kind[i] if of_a_kind else None for of_a_kind in states)]
        hidden = composed(masked, wide_dtype, hidden, *arguments)
    return hidden


def blocks_prefill_reference(hidden: Tensor, *arguments: Any) -> Tensor:
    """Sequences through norm, W_in, convolution, W_x, W_dt, scan, gate and W_out of one block after the other.

    The meaning is the composition of the ops' references, `quamba.ops.mixer_step.composed`, with the ops of sequences
    for the convolution and the scan; what leaves a block, in out_dtype, enters the next.

    Args:
        hidden: (B, L, E) any float dtype.
        blocks: the numbers of `quamba.ops.Block`s that are alive.
        wide_dtype: float dtype of what stays float between two ops: the rotation's input, dt without a scale, and d, B
            and C before their norms.
        out_dtype: float dtype of what every block returns.
        mask: (B, L), False or 0 at padding, as for `causal_conv1d`; or None.
        conv_states: for each block int8 (B, D, K), the last K inputs of the convolution, newest last: the left context,
            overwritten; or an empty list for zero contexts.
        ssm_states: for each block float32 (B, D, N): the initial state, overwritten with the final one; or an empty
            list for zero starts.

    Returns:
        (B, L, E) of out_dtype.

    Raises:
        ValueError: there is no block of one of the numbers, or not a state of a kind for each block.
    """
    return _composed(_REFERENCES, hidden, *arguments)


def blocks_prefill_fake(hidden: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(hidden, dtype=arguments[2], memory_format=torch.contiguous_format)


def blocks_prefill_cpu(hidden: Tensor, *arguments: Any) -> Tensor:
    """See `blocks_prefill_reference`."""
    return _composed(_CPU, hidden, *arguments)


blocks_prefill = register(
    "blocks_prefill",
    "(Tensor hidden, int[] blocks, ScalarType wide_dtype, ScalarType out_dtype, Tensor? mask,"
    " Tensor(a!)[] conv_states, Tensor(b!)[] ssm_states) -> Tensor",
    reference=blocks_prefill_reference,
    fake=blocks_prefill_fake,
    cpu=blocks_prefill_cpu,
)
