"""linear: int8 x int8 -> int32, then one rescaling to float or to int8."""

import torch
from torch import Tensor

from quamba import numerics
from quamba.ops.cpu.linear import linear_cpu
from quamba.ops.registry import register


def linear_reference(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """(x @ weight^T) * x_scale * weight_scale + bias + residual, in float32 after an exact int32 sum.

    Args:
        x: int8 (..., K).
        x_scale: float32 () per tensor, or (..., 1) per token.
        weight: int8 (N, K).
        weight_scale: float32 () or (N,).
        bias: (N,) any float dtype, or None.
        residual: (..., N) any float dtype, or None.
        out_scale: float32 () or (N,) for an int8 result, or None for a float one.
        out_dtype: torch.int8 where out_scale is given, else the float dtype of the result.

    Returns:
        (..., N) of out_dtype.
    """
    # int32 sums of int8 products are exact in float64 for every K that fits in memory.
    acc = (x.to(torch.float64) @ weight.to(torch.float64).T).to(torch.float32)
    out = acc * (x_scale * weight_scale)
    if bias is not None:
        out = out + bias.to(torch.float32)
    if residual is not None:
        out = out + residual.to(torch.float32)
    return out.to(out_dtype) if out_scale is None else numerics.quantize(out, out_scale)


def linear_fake(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


linear = register(
    "linear",
    "(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? residual,"
    " Tensor? out_scale, ScalarType out_dtype) -> Tensor",
    reference=linear_reference,
    fake=linear_fake,
    cpu=linear_cpu,
)
