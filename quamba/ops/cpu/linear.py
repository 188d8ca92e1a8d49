"""linear on the CPU: oneDNN's int8 GEMM for many rows, integer or float32 products for a few.

All three paths sum exactly. Which one is fastest depends on the size (two cores with AVX512-VNNI, microseconds at
one row, weights of eight layers in turn): 16 x 512 float32 3, integer 9, oneDNN 27; 512 x 256 12, 11, 29; 256 x 1024
22, 17, 31; 768 x 3072 150, 127, 82. oneDNN's call itself costs about 25.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from quamba import numerics
from quamba.ops import checks, native
from quamba.ops.cache import Derived
from quamba.ops.cpu.rows import linear_native

# Up to so many rows the native library is the fastest.
_NATIVE_ROWS = 8
# An int8 product is at most 2^14, so up to 2^10 of them sum exactly in the 24 bits of a float32.
_FLOAT_DEPTH = 1 << 10
_FLOAT_WEIGHT = 1 << 16
_FLOAT_PRODUCTS = 1 << 17
_INTEGER_WEIGHT = 1 << 20
_INTEGER_PRODUCTS = 1 << 22
_INTEGER_RESULTS = 1 << 14
_ONEDNN_OUTPUTS = (torch.int8, torch.float32, torch.bfloat16)


def _onednn(x: Tensor, packed: Tensor, scale: Tensor, offset: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """x (M, K) int8, the packed weight, scale and offset float32 (N,) -> (M, N) of out_dtype.

    Only unsigned activations have a fast kernel: x + 128 with zero point 128.
    """
    zero_points = torch.zeros(scale.shape, dtype=torch.int32, device="cpu")
    shifted = torch.bitwise_xor(x, -128).view(torch.uint8)
    out: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        shifted, 1.0, 128, packed, scale, zero_points, offset, 1.0, 0, out_dtype, "none", [], ""
    )
    return out


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    return packed


@lru_cache
def onednn_is_exact() -> bool:
    """Whether this build of torch and this CPU have oneDNN's int8 linear, and it saturates and sums exactly here.

    Older CPUs without VNNI can saturate in the middle of a sum; they take the integer path at every size.
    """
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    with torch.inference_mode(False), torch.no_grad():
        x = torch.tensor([[127, -128, 127] * 43, [-128, -128, 127] * 43], dtype=torch.int8, device="cpu")
        weight = torch.tensor([[127, -128, 127] * 43, [127, 127, -128] * 43], dtype=torch.int8, device="cpu")
        expected = torch._int_mm(x, weight.t())
        ones = torch.ones(2, dtype=torch.float32, device="cpu")
        try:
            exact = _onednn(x, _pack(weight), ones, None, torch.float32)
            small = _onednn(x, _pack(weight), ones * 2.0**-14, ones, torch.int8)
        except RuntimeError:
            return False
        rounded = numerics.to_int8_(expected.float() * 2.0**-14 + 1)
        return torch.equal(exact, expected.float()) and torch.equal(small, rounded)


_packed = Derived(_pack)


class _Plan(NamedTuple):
    """What is derived from the parameters: the result is sum * scale + offset, in units of any out_scale."""

    scale: Tensor  # float32 (N,)
    offset: Tensor | None  # float32 (N,)
    floats: Tensor | None  # weight^T, float32 (K, N), where it is small
    size: int
    depth: int


def _prepare(
    weight: Tensor, x_scale: Tensor | None, weight_scale: Tensor, bias: Tensor | None, out_scale: Tensor | None
) -> _Plan:
    checks.int8("linear", "weight", weight)
    checks.dims("linear", "weight", weight, 2)
    size, depth = weight.shape
    checks.scale("linear", "weight_scale", weight_scale, size)
    checks.scale("linear", "out_scale", out_scale, size)
    checks.vector("linear", "bias", bias, size)
    scale = weight_scale if x_scale is None else x_scale * weight_scale
    offset = None if bias is None else bias.to(torch.float32, copy=True)
    if out_scale is not None:
        scale = scale / out_scale
        offset = None if offset is None else offset / out_scale
    floats = None
    if weight.numel() <= _FLOAT_WEIGHT and depth <= _FLOAT_DEPTH:
        # A product with one row is fastest along the longer side.
        floats = weight.float().t() if depth >= size else weight.t().float().contiguous()
    return _Plan(scale.expand(size).clone(), offset, floats, size, depth)


_plan = Derived(_prepare)


def _onednn_pays(products: int, results: int, weight: Tensor) -> bool:
    """Whether M K N products or M N results are enough for oneDNN, whose epilogue is fused.

    An inference tensor would be packed at every call.
    """
    large = products > _INTEGER_PRODUCTS or results > _INTEGER_RESULTS or weight.numel() > _INTEGER_WEIGHT
    return large and products > 0 and not weight.is_inference() and onednn_is_exact()


def linear_cpu(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """See `linear_reference`. Packed weights and folded scales are kept until their tensors change."""
    checks.int8("linear", "x", x)
    checks.float32("linear", "x_scale", x_scale)
    checks.output("linear", out_scale, out_dtype)
    per_token = x_scale.dim() > 0
    # A residual is in units of the float result, so the division by out_scale has to come after it.
    folded_out_scale = out_scale if residual is None else None
    scale, offset, floats, size, depth = _plan(
        weight, None if per_token else x_scale, weight_scale, bias, folded_out_scale
    )
    shape = x.shape
    leading = shape[:-1]
    if shape[-1] != depth:
        checks.shape("linear", "x", x, (*leading, depth))
    if residual is not None:
        checks.shape("linear", "residual", residual, (*leading, size))
    if per_token:
        checks.shape("linear", "x_scale", x_scale, (*leading, 1))
    rows = x if len(shape) == 2 else x.reshape(leading.numel(), depth)
    results = len(rows) * size
    products = results * depth
    if (
        0 < len(rows) <= _NATIVE_ROWS
        and native.available()
        and not per_token
        and (residual is None or out_scale is None)
    ):
        return linear_native(rows, x_scale, weight, weight_scale, bias, residual, out_scale, out_dtype).view(
            *leading, size
        )
    inner = None if per_token else offset
    scaled = fused = False
    if floats is not None and products <= _FLOAT_PRODUCTS:
        out = torch.mm(rows.float(), floats)
    elif _onednn_pays(products, results, weight):
        fused = not per_token and residual is None and out_dtype in _ONEDNN_OUTPUTS
        out = _onednn(rows, _packed(weight), scale, inner, out_dtype if fused else torch.float32)
        scaled = True
    else:
        out = torch._int_mm(rows, weight.t())
    if not scaled:
        # int32 * float32 is float32, in one call.
        out = out * scale if inner is None else torch.addcmul(inner, out.float(), scale)
    out = out if len(shape) == 2 else out.view(*leading, size)
    if fused:
        return out
    if per_token:
        out = out.mul_(x_scale)
        out = out if offset is None else out.add_(offset)
    if residual is not None:
        return numerics.finish_(out.add_(residual), out_scale, out_dtype)
    return numerics.to_int8_(out) if out_scale is not None else numerics.finish_(out, None, out_dtype)
