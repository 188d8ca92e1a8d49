"""hadamard: the orthonormal Hadamard transform of the last dimension; hadamard_quant: the same, then int8."""

from functools import lru_cache

import torch
from torch import Tensor

from quamba import hadamard as _hadamard
from quamba import numerics
from quamba.ops import checks
from quamba.ops.cpu.rows import hadamard_quant_native
from quamba.ops.registry import register


def hadamard_reference(x: Tensor) -> Tensor:
    """(..., D) -> (..., D) of x's dtype: x H^T / sqrt(block), computed in float32 (float64 for float64).

    H is `quamba.hadamard.matrix(D)`: of order D, or block-diagonal where no such order can be built.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) @ _hadamard.matrix(x.shape[-1], dtype=dtype, device=x.device).T).to(x.dtype)


@lru_cache
def _factors(size: int) -> tuple[Tensor, Tensor, int, int]:
    with torch.inference_mode(False):
        left, right = _hadamard.factors(size, dtype=torch.float32)
    return left, right, len(left), len(right)


def _rotated(x: Tensor) -> Tensor:
    """x (..., D) float32 -> a new float32 (..., D) x H^T."""
    shape = x.shape
    left, right, rows, columns = _factors(shape[-1])
    if x.numel() == rows * columns:
        return torch.mm(left, torch.mm(x.reshape(rows, columns), right)).view(shape)
    return torch.matmul(left, torch.matmul(x.reshape(-1, rows, columns), right)).view(shape)


def hadamard_cpu(x: Tensor) -> Tensor:
    checks.dtype("hadamard", "x", x, checks.FLOATS)
    return _hadamard.transform(x) if x.dtype is torch.float64 else _rotated(x.float()).to(x.dtype)


def hadamard_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def hadamard_quant_reference(x: Tensor, scale: Tensor) -> Tensor:
    """(..., D) float -> int8 (..., D): q(x H^T / sqrt(block), scale); scale float32 () or (D,)."""
    return numerics.quantize(hadamard_reference(x.to(torch.float32)), scale)


def hadamard_quant_cpu(x: Tensor, scale: Tensor) -> Tensor:
    checks.dtype("hadamard_quant", "x", x, checks.FLOATS)
    checks.scale("hadamard_quant", "scale", scale, x.shape[-1])
    native = hadamard_quant_native(x, scale)
    return numerics.to_int8_(_rotated(x.float()).div_(scale)) if native is None else native


def hadamard_quant_fake(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)


hadamard = register(
    "hadamard",
    "(Tensor x) -> Tensor",
    reference=hadamard_reference,
    fake=hadamard_fake,
    cpu=hadamard_cpu,
)
hadamard_quant = register(
    "hadamard_quant",
    "(Tensor x, Tensor scale) -> Tensor",
    reference=hadamard_quant_reference,
    fake=hadamard_quant_fake,
    cpu=hadamard_quant_cpu,
)
