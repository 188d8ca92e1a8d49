"""selective_scan: the recurrence of a selective state space model with D skip and SiLU gate; its decode steps."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba import numerics
from quamba.ops.cpu.linear import linear_cpu
from quamba.ops.cpu.selective_scan import selective_scan_cpu, selective_scan_step_cpu
from quamba.ops.linear import linear_reference
from quamba.ops.registry import float64_in, register


def selective_scan_reference(
    x: Tensor,
    x_scale: Tensor | None,
    dt: Tensor,
    dt_scale: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    B_scale: Tensor | None,
    C: Tensor,
    C_scale: Tensor | None,
    D: Tensor,
    z: Tensor | None,
    z_scale: Tensor | None,
    out_scale: Tensor | None,
    out_dtype: torch.dtype,
    state: Tensor | None,
) -> Tensor:
    """The selective scan (Gu and Dao 2023, algorithm 2), gated, in float32 (float64 for float64 x).

    With dt_t = softplus(dt_t + dt_bias): s_t = exp(dt_t A) s_(t-1) + dt_t B_t x_t, y_t = C_t s_t + D x_t, and
    the result is y_t * SiLU(z_t). Each of x, dt, B, C, z is int8 with its scale, or float; a scale that is given
    with a float tensor multiplies it just the same.

    Args:
        x, z: (B, L, D), any strides; z None for no gate. Scales float32 () or (D,).
        dt: (B, L, D) before bias and softplus. Scale float32 () or (D,).
        dt_bias, D: (D,) any float dtype.
        A: float32 (D, N), negative.
        B, C: (B, L, N), any strides. Scales float32 () or (N,).
        out_scale: float32 () or (D,) for an int8 result, or None for a float one.
        out_dtype: torch.int8 where out_scale is given, else the float dtype of the result.
        state: float32 (B, D, N): the initial state, overwritten with the final one; None for a zero start.

    Returns:
        (B, L, D) of out_dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, dt, B, C = (
        numerics.dequantize(value, scale, wide)
        for value, scale in ((x, x_scale), (dt, dt_scale), (B, B_scale), (C, C_scale))
    )
    dt = F.softplus(dt + dt_bias.to(wide))
    s = x.new_zeros(x.shape[0], *A.shape) if state is None else state.clone()
    rows = []
    for t in range(x.shape[1]):
        s = torch.exp(dt[:, t, :, None] * A) * s + (dt[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        rows.append(torch.einsum("bdn,bn->bd", s, C[:, t]))
    y = torch.stack(rows, dim=1) if rows else torch.zeros_like(x)
    y = y + D.to(wide) * x
    if z is not None:
        y = y * F.silu(numerics.dequantize(z, z_scale, wide))
    if state is not None:
        state.copy_(s)
    return y.to(out_dtype) if out_scale is None else numerics.quantize(y, out_scale)


def selective_scan_fake(
    x: Tensor,
    x_scale: Tensor | None,
    dt: Tensor,
    dt_scale: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    B_scale: Tensor | None,
    C: Tensor,
    C_scale: Tensor | None,
    D: Tensor,
    z: Tensor | None,
    z_scale: Tensor | None,
    out_scale: Tensor | None,
    out_dtype: torch.dtype,
    state: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape, dtype=out_dtype)


def selective_scan_step_reference(
    x: Tensor,
    x_scale: Tensor | None,
    dt: Tensor,
    dt_scale: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    B_scale: Tensor | None,
    C: Tensor,
    C_scale: Tensor | None,
    D: Tensor,
    z: Tensor | None,
    z_scale: Tensor | None,
    out_scale: Tensor | None,
    out_dtype: torch.dtype,
    state: Tensor,
) -> Tensor:
    """One token of `selective_scan`: x, dt, z (B, D); B, C (B, N); state (B, D, N) is updated in place."""
    return selective_scan_reference(
        x[:, None],
        x_scale,
        dt[:, None],
        dt_scale,
        dt_bias,
        A,
        B[:, None],
        B_scale,
        C[:, None],
        C_scale,
        D,
        None if z is None else z[:, None],
        z_scale,
        out_scale,
        out_dtype,
        state,
    )[:, 0].contiguous()


def _dt(product: Callable[..., Tensor], arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of a step from those of selective_scan_dt_step."""
    x, x_scale, d, d_scale, weight, weight_scale, dt_scale, *rest = arguments
    dtype = torch.float32 if dt_scale is None else torch.int8
    return x, x_scale, product(d, d_scale, weight, weight_scale, None, None, dt_scale, dtype), dt_scale, *rest


def selective_scan_dt_step_reference(x: Tensor, *arguments: Any) -> Tensor:
    """`selective_scan_step` with dt = W_dt d, an int8 product: `linear` and the step in one op.

    Args:
        x, x_scale: as for the step.
        d: int8 (B, R).
        d_scale: float32 ().
        dt_weight: int8 (D, R).
        dt_weight_scale: float32 () or (D,).
        dt_scale: float32 () or (D,), with which dt is quantized, or None: it stays float32.
        dt_bias to state: as for the step.

    Returns:
        (B, D) of out_dtype.
    """
    return selective_scan_step_reference(*_dt(linear_reference, (x, *arguments)))


def selective_scan_dt_step_fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=arguments[-2])


def selective_scan_dt_step_cpu(x: Tensor, *arguments: Any) -> Tensor:
    """See `selective_scan_dt_step_reference`."""
    out: Tensor = selective_scan_step_cpu(*_dt(linear_cpu, (x, *arguments)))
    return out


_INPUT = "(Tensor x, Tensor? x_scale, "
_COMMON = (
    " Tensor dt_bias, Tensor A, Tensor B, Tensor? B_scale, Tensor C, Tensor? C_scale, Tensor D, Tensor? z,"
    " Tensor? z_scale, Tensor? out_scale, ScalarType out_dtype,"
)
selective_scan = register(
    "selective_scan",
    _INPUT + "Tensor dt, Tensor? dt_scale," + _COMMON + " Tensor(a!)? state) -> Tensor",
    reference=selective_scan_reference,
    fake=selective_scan_fake,
    cpu=float64_in(selective_scan_reference, selective_scan_cpu),
)
selective_scan_step = register(
    "selective_scan_step",
    _INPUT + "Tensor dt, Tensor? dt_scale," + _COMMON + " Tensor(a!) state) -> Tensor",
    reference=selective_scan_step_reference,
    fake=selective_scan_fake,
    cpu=float64_in(selective_scan_step_reference, selective_scan_step_cpu),
)
selective_scan_dt_step = register(
    "selective_scan_dt_step",
    _INPUT
    + "Tensor d, Tensor d_scale, Tensor dt_weight, Tensor dt_weight_scale, Tensor? dt_scale,"
    + _COMMON
    + " Tensor(a!) state) -> Tensor",
    reference=selective_scan_dt_step_reference,
    fake=selective_scan_dt_step_fake,
    cpu=float64_in(selective_scan_dt_step_reference, selective_scan_dt_step_cpu),
)
