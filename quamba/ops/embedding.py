"""embedding: look up int8 rows and dequantize them."""

import torch
from torch import Tensor

from quamba.ops import checks
from quamba.ops.registry import register

_INTEGERS = frozenset((torch.int64, torch.int32))


def embedding_reference(
    ids: Tensor, weight: Tensor, weight_scale: Tensor, column_scale: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """weight[ids] * weight_scale[ids] * column_scale.

    Args:
        ids: int64 or int32, any shape, 0 <= id < V.
        weight: int8 (V, E).
        weight_scale: float32 (V,) per row, or ().
        column_scale: float32 (E,), or None.
        out_dtype: float dtype of the result.

    Returns:
        (*ids.shape, E) of out_dtype.
    """
    rows = weight[ids].to(torch.float32)
    rows = rows * (weight_scale if weight_scale.dim() == 0 else weight_scale[ids][..., None])
    return (rows if column_scale is None else rows * column_scale).to(out_dtype)


def embedding_cpu(
    ids: Tensor, weight: Tensor, weight_scale: Tensor, column_scale: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    checks.dtype("embedding", "ids", ids, _INTEGERS)
    checks.int8("embedding", "weight", weight)
    checks.dims("embedding", "weight", weight, 2)
    checks.scale("embedding", "weight_scale", weight_scale, weight.shape[0])
    if column_scale is not None:
        checks.float32("embedding", "column_scale", column_scale)
        checks.shape("embedding", "column_scale", column_scale, weight.shape[1:])
    checks.output("embedding", None, out_dtype)
    rows = torch.embedding(weight, ids).float()
    rows.mul_(weight_scale if weight_scale.dim() == 0 else weight_scale[ids].unsqueeze(-1))
    if column_scale is not None:
        rows.mul_(column_scale)
    return rows.to(out_dtype)


def embedding_fake(
    ids: Tensor, weight: Tensor, weight_scale: Tensor, column_scale: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]), dtype=out_dtype)


embedding = register(
    "embedding",
    "(Tensor ids, Tensor weight, Tensor weight_scale, Tensor? column_scale, ScalarType out_dtype) -> Tensor",
    reference=embedding_reference,
    fake=embedding_fake,
    cpu=embedding_cpu,
)
