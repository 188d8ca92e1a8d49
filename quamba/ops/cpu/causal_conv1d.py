"""causal_conv1d on the CPU, native: int8 inputs and weights."""

import torch
from torch import Tensor

from quamba.ops import native


def causal_conv1d_native(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    out_scale: Tensor | None,
    out_dtype: torch.dtype,
    mask: Tensor | None,
    conv_state: Tensor | None,
) -> Tensor | None:
    """See `causal_conv1d_reference`; None where the library is missing or an operand is not int8 with a scale.

    mask is bool.
    """
    int8 = x.dtype is torch.int8 and weight.dtype is torch.int8
    if not (native.available() and int8 and x.numel()) or x_scale is None or weight_scale is None:
        return None
    batch, length, channels = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    state = None if conv_state is None else conv_state.contiguous()
    out = torch.empty(x.shape, dtype=torch.int8 if out_scale is not None else torch.float32, device="cpu")
    native.run(
        "causal_conv1d",
        batch=batch,
        length=length,
        channels=channels,
        width=weight.shape[1],
        threads=torch.get_num_threads(),
        x=x,
        x_batch_stride=x.stride(0),
        x_stride=x.stride(1),
        x_scale=native.scale(x_scale),
        weight=weight.contiguous(),
        weight_scale=native.scale(weight_scale),
        bias=native.float32(bias),
        out_scale=native.scale(out_scale),
        mask=None if mask is None else mask.contiguous(),
        state=state,
        out=out,
    )
    if state is not None and conv_state is not None and state is not conv_state:
        conv_state.copy_(state)
    return out if out.dtype is out_dtype else out.to(out_dtype)
