"""rms_norm_quant: RMSNorm, then int8 with a static scale, in one rounding."""

from functools import lru_cache

import torch
from torch import Tensor

from quamba import numerics
from quamba.ops import checks
from quamba.ops.cache import Derived
from quamba.ops.cpu.rows import rms_norm_quant_native
from quamba.ops.registry import register


def rms_norm_quant_reference(x: Tensor, weight: Tensor | None, scale: Tensor, eps: float) -> Tensor:
    """q(x / sqrt(mean(x^2) + eps) * weight, scale), all in float32.

    Args:
        x: (..., E) any float dtype, any strides.
        weight: (E,) any float dtype, or None for a norm without weight.
        scale: float32 () or (E,).
        eps: added to the mean square.

    Returns:
        int8 (..., E).
    """
    x = x.to(torch.float32)
    x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        x = x * weight.to(torch.float32)
    return numerics.quantize(x, scale)


@lru_cache
def _constant(value: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float32, device="cpu")


_gain = Derived(lambda weight, scale: weight.float() / scale)


def rms_norm_quant_cpu(x: Tensor, weight: Tensor | None, scale: Tensor, eps: float) -> Tensor:
    size = x.shape[-1]
    checks.dtype("rms_norm_quant", "x", x, checks.FLOATS)
    checks.vector("rms_norm_quant", "weight", weight, size)
    checks.scale("rms_norm_quant", "scale", scale, size)
    native = rms_norm_quant_native(x, weight, scale, eps)
    if native is not None:
        return native
    x = x.float().contiguous()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    out = x * torch.addcmul(_constant(eps), norm, norm, value=1 / size).rsqrt_()
    if weight is None:
        return numerics.to_int8_(out.div_(scale))
    return numerics.to_int8_(out.mul_(_gain(weight, scale)))


def rms_norm_quant_fake(x: Tensor, weight: Tensor | None, scale: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)


rms_norm_quant = register(
    "rms_norm_quant",
    "(Tensor x, Tensor? weight, Tensor scale, float eps) -> Tensor",
    reference=rms_norm_quant_reference,
    fake=rms_norm_quant_fake,
    cpu=rms_norm_quant_cpu,
)
