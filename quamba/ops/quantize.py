"""quantize: float to int8 with a static scale; quantize_per_token: with a scale found at run time."""

import torch
from torch import Tensor

from quamba import numerics
from quamba.ops import checks
from quamba.ops.registry import register


def quantize_reference(x: Tensor, scale: Tensor) -> Tensor:
    """(..., D) float -> int8; scale float32 (), (D,) or (..., 1)."""
    return numerics.quantize(x, scale)


def quantize_cpu(x: Tensor, scale: Tensor) -> Tensor:
    checks.dtype("quantize", "x", x, checks.FLOATS)
    checks.float32("quantize", "scale", scale)
    if scale.dim() != 0 and scale.shape != x.shape[-1:]:
        checks.shape("quantize", "scale", scale, (*x.shape[:-1], 1))
    return numerics.quantize(x.contiguous(), scale)


def quantize_fake(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)


def quantize_per_token_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) float -> int8 (..., D) and float32 scales (..., 1)."""
    scale = numerics.token_scale(x)
    return numerics.quantize(x, scale), scale


def quantize_per_token_cpu(x: Tensor) -> tuple[Tensor, Tensor]:
    checks.dtype("quantize_per_token", "x", x, checks.FLOATS)
    return quantize_per_token_reference(x.float().contiguous())


def quantize_per_token_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    q = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    return q, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


quantize = register(
    "quantize",
    "(Tensor x, Tensor scale) -> Tensor",
    reference=quantize_reference,
    fake=quantize_fake,
    cpu=quantize_cpu,
)
quantize_per_token = register(
    "quantize_per_token",
    "(Tensor x) -> (Tensor, Tensor)",
    reference=quantize_per_token_reference,
    fake=quantize_per_token_fake,
    cpu=quantize_per_token_cpu,
)
