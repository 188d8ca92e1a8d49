"""hadamard_inverse: undo the Hadamard transform; only the recipe that rotates x for x_proj needs it."""

import torch
from torch import Tensor

from quamba import hadamard as _hadamard
from quamba.ops.registry import register


def hadamard_inverse_reference(x: Tensor) -> Tensor:
    """(..., D) -> (..., D) of x's dtype: x H / sqrt(block), computed in float32 (float64 for float64)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) @ _hadamard.matrix(x.shape[-1], dtype=dtype, device=x.device)).to(x.dtype)


def hadamard_inverse_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


hadamard_inverse = register(
    "hadamard_inverse",
    "(Tensor x) -> Tensor",
    reference=hadamard_inverse_reference,
    fake=hadamard_inverse_fake,
    cpu=_hadamard.inverse,
    # Two library GEMMs serve there as well: this op is on no fast path.
    cuda=_hadamard.inverse,
)
