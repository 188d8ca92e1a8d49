"""The ops that go row by row on the CPU, native: each returns None where the library is missing."""

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
