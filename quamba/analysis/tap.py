"""Seeing the output y of the selective scan, which no site of the package shows: the ops gate it before it leaves.

The ops go through torch's dispatcher wherever a dispatch mode is active, so a mode sees every scan with its
arguments, of the float mixer and of the quantized one alike, and nothing else has to change.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quamba import numerics, ops


@dataclass(frozen=True, eq=False)
class Scan:
    """One selective scan.

    Attributes:
        y: float32 (B, L, D), its output before the gate.
        dt: float32 (B, L, D), the step sizes, after bias and softplus.
        A: float32 (D, N).
    """

    y: Tensor
    dt: Tensor
    A: Tensor


class ScanTap(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, hands every selective scan over a sequence to `see`, and may quantize its output.

    Single decoding steps have an op of their own and are not seen; nor is anything inside `ops.reference()`.
    """

    def __init__(self, see: Callable[[Scan], None] | None = None, *, y_scale: Tensor | None = None) -> None:
        """Make a tap.

        Args:
            see: called with every scan, after y is quantized; or None.
            y_scale: float32 () or (D,): quantize y to int8 and back before the gate; None leaves it.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.see = see
        self.y_scale = y_scale

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the op; a selective scan is seen on the way."""
        if func is not ops.selective_scan.overload:
            return func(*args, **(kwargs or {}))
        *inputs, z, z_scale, out_scale, out_dtype, state = args
        y = ops.selective_scan(*inputs, None, None, None, torch.float32, None if state is None else state.clone())
        if self.y_scale is not None:
            y = numerics.dequantize(numerics.quantize(y, self.y_scale), self.y_scale)
        if self.see is not None:
            _, _, dt, dt_scale, dt_bias, A, *_ = inputs
            step = F.softplus(numerics.dequantize(dt, dt_scale) + dt_bias.to(torch.float32))
            self.see(Scan(y=y, dt=step, A=A.to(torch.float32)))
        out = func(*args)
        if self.y_scale is None:
            return out
        gated = y if z is None else y * F.silu(numerics.dequantize(z, z_scale))
        return numerics.finish_(gated, out_scale, out_dtype)


class QuantizedScanOutput(nn.Module):
    """A mixer whose scan output y is quantized and dequantized before the gate, and nothing else of it."""

    def __init__(self, mixer: nn.Module, y_scale: Tensor) -> None:
        """Hold a mixer, float or quantized, and the scale of y, float32 () or (D,)."""
        super().__init__()
        self.inner = mixer
        self.y_scale = y_scale

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, state: None = None) -> Tensor:
        """(B, L, E) -> (B, L, E), as the mixer does."""
        with ScanTap(y_scale=self.y_scale):
            out: Tensor = self.inner(hidden, mask=mask, state=state)
        return out
