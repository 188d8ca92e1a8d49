"""The ops that go row by row on the CPU, native; the optional results are None where the library is missing."""

from functools import lru_cache

import torch
from torch import Tensor

from quamba import hadamard
from quamba.ops import native


def _rows(x: Tensor) -> Tensor:
    """(..., E) -> (rows, E) float32, the last dimension contiguous."""
    rows = x.float().reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def rms_norm_quant_native(x: Tensor, weight: Tensor | None, scale: Tensor, eps: float) -> Tensor | None:
    """See `rms_norm_quant_reference`."""
    if not native.available():
        return None
    rows, out = _rows(x), torch.empty(x.shape, dtype=torch.int8, device="cpu")
    native.run(
        "rms_norm_quant",
        rows=rows.shape[0],
        size=rows.shape[1],
        threads=torch.get_num_threads(),
        x=rows,
        x_stride=rows.stride(0),
        weight=native.float32(weight),
        eps=eps,
        scale=native.scale(scale),
        out=out,
    )
    return out


@lru_cache
def hadamard_layout(size: int) -> tuple[int, int, int, Tensor]:
    """(blocks, power, base, signs of the base matrix) of `quamba.hadamard.decompose`."""
    blocks, power, base = hadamard.decompose(size)
    with torch.inference_mode(False):
        return blocks, power, base, hadamard.base_matrix(base)


def hadamard_quant_native(x: Tensor, scale: Tensor) -> Tensor | None:
    """See `hadamard_quant_reference`."""
    if not native.available():
        return None
    rows, out = _rows(x).contiguous(), torch.empty(x.shape, dtype=torch.int8, device="cpu")
    blocks, power, base, signs = hadamard_layout(x.shape[-1])
    native.run(
        "hadamard_quant",
        rows=rows.shape[0],
        blocks=blocks,
        power=power,
        base=base,
        threads=torch.get_num_threads(),
        base_signs=signs,
        x=rows,
        scale=native.scale(scale),
        out=out,
    )
    return out


def linear_native(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`linear_reference` for x (M, K), with x_scale () and at most one of residual and out_scale."""
    size, depth = weight.shape
    x = x.contiguous()
    out = torch.empty((len(x), size), dtype=torch.float32 if out_scale is None else torch.int8, device="cpu")
    native.run(
        "linear",
        rows=len(x),
        size=size,
        depth=depth,
        threads=torch.get_num_threads(),
        x=x,
        x_scale=x_scale,
        weight=weight.contiguous(),
        weight_scale=native.scale(weight_scale),
        bias=native.float32(bias),
        residual=native.float32(residual),
        out_scale=native.scale(out_scale),
        out=out,
    )
    return out if out.dtype is out_dtype else out.to(out_dtype)
