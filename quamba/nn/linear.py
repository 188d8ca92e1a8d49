"""The quantized linear layer: int8 or float weights behind one forward; bit-widths are data."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quamba import numerics, ops
from quamba.recipe import QuantSpec


class QuantizedLinear(nn.Module):
    """y = x W^T + b, with W int8 (`qweight`, `weight_scale`) or, where its spec is None, float (`weight`).

    x may be int8 with its scale or float; where both operands are int8 the product is integer arithmetic,
    otherwise the int8 one is dequantized first.
    """

    qweight: Tensor
    weight_scale: Tensor
    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        bias: bool,
        spec: QuantSpec | None,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
    ) -> None:
        """Make an empty layer; fill it with `fill` or from a state dict.

        Args:
            in_features, out_features: K, N.
            bias: whether there is one.
            spec: of the weight, or None to keep it float.
            dtype: of a float weight and of the bias.
            device: where the empty tensors lie.
        """
        super().__init__()
        self.spec = spec
        if spec is None:
            self.register_buffer("weight", torch.empty(out_features, in_features, dtype=dtype, device=device))
        else:
            rows = (out_features,) if spec.granularity == "channel" else ()
            self.register_buffer("qweight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
            self.register_buffer("weight_scale", torch.empty(rows, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Quantize (or keep) a float weight (N, K) and bias (N,), replacing the empty tensors."""
        if self.spec is None:
            self.weight = weight.detach().to(self.weight.dtype).contiguous()
        else:
            self.qweight, self.weight_scale = numerics.quantize_weight(
                weight, per_channel=self.spec.granularity == "channel"
            )
        if self.bias is not None and bias is not None:
            self.bias = bias.detach().to(self.bias.dtype)

    def float_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, K): the weight as the layer uses it, dequantized."""
        if self.spec is None:
            return self.weight.to(dtype)
        scale = self.weight_scale
        return numerics.dequantize(self.qweight, scale[:, None] if scale.dim() else scale, dtype)

    def forward(
        self,
        x: Tensor,
        x_scale: Tensor | None,
        *,
        out_dtype: torch.dtype,
        out_scale: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Multiply, add, and requantize where out_scale is given.

        Args:
            x: (..., K) int8 with x_scale, or float with x_scale None.
            x_scale: float32 (), or (..., 1) per token, or None.
            out_dtype: float dtype of the result; torch.int8 where out_scale is given.
            out_scale: float32 () or (N,), or None.
            residual: (..., N), added before requantization, or None.

        Returns:
            (..., N) of out_dtype.
        """
        if self.spec is not None and x_scale is not None:
            return ops.linear(x, x_scale, self.qweight, self.weight_scale, self.bias, residual, out_scale, out_dtype)  # type: ignore[no-any-return]
        wide = numerics.dequantize(x, x_scale)
        out = F.linear(wide, self.float_weight(), None if self.bias is None else self.bias.to(torch.float32))
        if residual is not None:
            out = out + residual
        return out.to(out_dtype) if out_scale is None else ops.quantize(out, out_scale)
