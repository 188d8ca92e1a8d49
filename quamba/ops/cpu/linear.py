"""linear on the CPU: oneDNN's int8 GEMM for many rows, integer or float32 products for a few.

All three paths sum exactly. Which one is fastest depends on the size (two cores with AVX512-VNNI, microseconds at
one row, weights of eight layers in turn): 16 x 512 float32 3, integer 9, oneDNN 27; 512 x 256 12, 11, 29; 256 x 1024
22, 17, 31; 768 x 3072 150, 127, 82. oneDNN's call itself costs about 25.
"""

from functools import lru_cache

import torch
from torch import Tensor

from quamba import numerics
from quamba.ops import checks, native
from quamba.ops.cache import Derived

# An int8 product is at most 2^14, so up to 2^10 of them sum exactly in the 24 bits of a float32.
_NATIVE_ROWS = 8
_FLOAT_DEPTH = 1 << 10
_FLOAT_WEIGHT = 1 << 16
_FLOAT_PRODUCTS = 1 << 17
_INTEGER_WEIGHT = 1 << 20
_INTEGER_PRODUCTS = 1 << 22
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


# Both keep a copy, never the weight itself.
_packed = Derived(_pack)
_floats = Derived(lambda weight: weight.t().to(torch.float32, memory_format=torch.contiguous_format))


def _fold(
    weight: Tensor, x_scale: Tensor | None, weight_scale: Tensor, bias: Tensor | None, out_scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(scale, offset), float32 (N,): the result is sum * scale + offset, in units of out_scale if there is one."""
    size = weight.shape[0]
    checks.int8("linear", "weight", weight)
    checks.scale("linear", "weight_scale", weight_scale, size)
    checks.scale("linear", "out_scale", out_scale, size)
    checks.vector("linear", "bias", bias, size)
    scale = weight_scale if x_scale is None else x_scale * weight_scale
    offset = None if bias is None else bias.to(torch.float32)
    if out_scale is not None:
        scale = scale / out_scale
        offset = None if offset is None else offset / out_scale
    return scale.expand(size).clone(), None if offset is None else offset.clone()


_folded = Derived(_fold)


def _native(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`linear_reference` in quamba/_cpu, but for a residual together with an out_scale, and scales per token."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty(
        (*x.shape[:-1], len(weight)), dtype=torch.int8 if out_scale is not None else torch.float32, device="cpu"
    )
    native.run(
        "linear",
        rows=rows.shape[0],
        size=weight.shape[0],
        depth=weight.shape[1],
        threads=torch.get_num_threads(),
        x=rows,
        x_scale=x_scale,
        weight=weight.contiguous(),
        weight_scale=native.scale(weight_scale),
        bias=native.float32(bias),
        residual=native.float32(residual),
        out_scale=native.scale(out_scale),
        out=out,
    )
    return out if out.dtype is out_dtype else out.to(out_dtype)


def _onednn_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether x (M, K) weight^T is large enough for oneDNN; an inference tensor would be packed at every call."""
    elements = weight.numel()
    large = elements > _INTEGER_WEIGHT or len(x) * elements > _INTEGER_PRODUCTS
    return large and elements > 0 and len(x) > 0 and not weight.is_inference() and onednn_is_exact()


def _scaled_sums(x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """x (M, K) int8 -> sums * scale + offset, float32 (M, N); for few rows, or where oneDNN cannot serve."""
    elements = weight.numel()
    products = len(x) * elements
    if products <= _FLOAT_PRODUCTS and elements <= _FLOAT_WEIGHT and weight.shape[1] <= _FLOAT_DEPTH:
        sums = torch.mm(x.float(), _floats(weight))
    else:
        sums = torch._int_mm(x, weight.t()).float()
    return sums.mul_(scale) if offset is None else torch.addcmul(offset, sums, scale)


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
    checks.output("linear", out_scale, out_dtype)
    checks.float32("linear", "x_scale", x_scale)
    shape = x.shape
    size, depth = weight.shape
    if shape[-1] != depth:
        checks.shape("linear", "x", x, (*shape[:-1], depth))
    if residual is not None:
        checks.shape("linear", "residual", residual, (*shape[:-1], size))
    per_token = x_scale.dim() > 0
    if per_token:
        checks.shape("linear", "x_scale", x_scale, (*shape[:-1], 1))
    if native.available() and x.numel() <= _NATIVE_ROWS * depth and not per_token and (residual is None or out_scale is None):
        checks.int8("linear", "weight", weight)
        checks.scale("linear", "weight_scale", weight_scale, size)
        checks.scale("linear", "out_scale", out_scale, size)
        checks.vector("linear", "bias", bias, size)
        return _native(x, x_scale, weight, weight_scale, bias, residual, out_scale, out_dtype)
    # A residual is in units of the float result, so the division by out_scale has to come after it.
    folded_out_scale = out_scale if residual is None else None
    scale, offset = _folded(weight, None if per_token else x_scale, weight_scale, bias, folded_out_scale)
    inner = None if per_token else offset
    rows = x if x.dim() == 2 else x.reshape(-1, depth)
    if _onednn_pays(rows, weight):
        fused = not per_token and residual is None and out_dtype in _ONEDNN_OUTPUTS
        out = _onednn(rows, _packed(weight), scale, inner, out_dtype if fused else torch.float32)
    else:
        fused = False
        out = _scaled_sums(rows, weight, scale, inner)
    out = out if x.dim() == 2 else out.view(*shape[:-1], size)
    if fused:
        return out
    if per_token:
        out = out.mul_(x_scale)
        out = out if offset is None else out.add_(offset)
    if residual is not None:
        out = out.add_(residual)
        return out.to(out_dtype) if out_scale is None else numerics.quantize(out, out_scale)
    return out.to(out_dtype) if out_scale is None else numerics.to_int8_(out)
