"""mixer_step on the CPU, native: the block's tensors are packed once, a step passes four pointers."""

from typing import Any

import torch
from torch import Tensor

from quamba.ops import checks, native
from quamba.ops.cache import Derived
from quamba.ops.cpu.rows import hadamard_layout


def _plan(
    norm_weight: Tensor,
    norm_eps: float,
    u_scale: Tensor,
    in_weight: Tensor,
    in_weight_scale: Tensor,
    in_bias: Tensor | None,
    xz_scale: Tensor,
    conv_weight: Tensor,
    conv_weight_scale: Tensor,
    conv_bias: Tensor | None,
    x_scale: Tensor,
    x_weight: Tensor,
    x_weight_scale: Tensor,
    x_in_scale: Tensor,
    x_scan_scale: Tensor,
    d_norm_weight: Tensor | None,
    B_norm_weight: Tensor | None,
    C_norm_weight: Tensor | None,
    dbc_eps: float | None,
    dbc_scale: Tensor,
    dt_weight: Tensor,
    dt_weight_scale: Tensor,
    dt_scale: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    rotate: bool,
    g_scale: Tensor,
    out_weight: Tensor,
    out_weight_scale: Tensor,
    out_bias: Tensor | None,
    residual: bool,
    out_dtype: torch.dtype,
) -> tuple[bytes, tuple[int, int, int, int], list[Tensor | None]]:
    """Check the block's tensors and pack them: (bytes, (E, D, N, K), what the bytes point to besides arguments)."""
    op = "mixer_step"
    (inner, size), (model, rank) = A.shape, (in_weight.shape[1], dt_weight.shape[1])
    width, rows = conv_weight.shape[1], rank + 2 * size
    for name, weight, shape in (
        ("in_weight", in_weight, (2 * inner, model)),
        ("conv_weight", conv_weight, (inner, width)),
        ("x_weight", x_weight, (rows, inner)),
        ("dt_weight", dt_weight, (inner, rank)),
        ("out_weight", out_weight, (model, inner)),
    ):
        checks.int8(op, name, weight)
        checks.shape(op, name, weight, shape)
    for name, scale, count in (
        ("in_weight_scale", in_weight_scale, 2 * inner),
        ("conv_weight_scale", conv_weight_scale, inner),
        ("x_weight_scale", x_weight_scale, rows),
        ("dt_weight_scale", dt_weight_scale, inner),
        ("out_weight_scale", out_weight_scale, model),
        ("x_scale", x_scale, inner),
        ("x_scan_scale", x_scan_scale, inner),
        ("dt_scale", dt_scale, inner),
    ):
        checks.scale(op, name, scale, count)
    for name, single in (("u_scale", u_scale), ("x_in_scale", x_in_scale), ("g_scale", g_scale)):
        checks.float32(op, name, single)
        checks.shape(op, name, single, ())
    for name, many, length in (("xz_scale", xz_scale, 2 * inner), ("dbc_scale", dbc_scale, rows)):
        checks.float32(op, name, many)
        checks.shape(op, name, many, (length,))
    for name, vector, length in (
        ("norm_weight", norm_weight, model),
        ("in_bias", in_bias, 2 * inner),
        ("conv_bias", conv_bias, inner),
        ("d_norm_weight", d_norm_weight, rank),
        ("B_norm_weight", B_norm_weight, size),
        ("C_norm_weight", C_norm_weight, size),
        ("dt_bias", dt_bias, inner),
        ("D", D, inner),
        ("out_bias", out_bias, model),
    ):
        checks.vector(op, name, vector, length)
    checks.float32(op, "A", A)
    checks.output(op, None, out_dtype)

    kept: list[Tensor | None] = []

    def plain(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        flat = tensor.contiguous()
        # The key of the cache must not be held by its own value.
        if flat is not norm_weight:
            kept.append(flat)
        return flat

    def vector32(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else plain(tensor.to(torch.float32))

    blocks, power, base, signs = hadamard_layout(inner)
    packed = native.pack(
        "mixer_step",
        d_model=model,
        d_inner=inner,
        d_state=size,
        d_conv=width,
        dt_rank=rank,
        norm_weight=vector32(norm_weight),
        norm_eps=norm_eps,
        u_scale=u_scale,
        in_weight=plain(in_weight),
        in_weight_scale=plain(in_weight_scale),
        in_bias=vector32(in_bias),
        xz_scale=plain(xz_scale),
        conv_weight=plain(conv_weight),
        conv_weight_scale=plain(conv_weight_scale),
        conv_bias=vector32(conv_bias),
        x_scale=plain(x_scale),
        x_weight=plain(x_weight),
        x_weight_scale=plain(x_weight_scale),
        x_in_scale=x_in_scale,
        x_scan_scale=plain(x_scan_scale),
        norm_dbc=dbc_eps is not None,
        d_norm_weight=vector32(d_norm_weight),
        B_norm_weight=vector32(B_norm_weight),
        C_norm_weight=vector32(C_norm_weight),
        dbc_eps=0.0 if dbc_eps is None else dbc_eps,
        dbc_scale=plain(dbc_scale),
        dt_weight=plain(dt_weight),
        dt_weight_scale=plain(dt_weight_scale),
        dt_scale=plain(dt_scale),
        dt_bias=vector32(dt_bias),
        A=plain(A),
        D=vector32(D),
        rotate=rotate,
        blocks=blocks,
        power=power,
        base=base,
        base_signs=signs,
        g_scale=g_scale,
        out_weight=plain(out_weight),
        out_weight_scale=plain(out_weight_scale),
        out_bias=vector32(out_bias),
        residual=residual,
    )
    return packed, (model, inner, size, width), kept


_plans = Derived(_plan)


def mixer_step_native(hidden: Tensor, *arguments: Any) -> Tensor | None:
    """See `mixer_step_reference`; None where the library is missing or a state is not contiguous."""
    library = native.library()
    *block, conv_state, ssm_state = arguments
    if library is None or not (conv_state.is_contiguous() and ssm_state.is_contiguous()):
        return None
    packed, (model, inner, size, width), _ = _plans(*block)
    checks.dtype("mixer_step", "hidden", hidden, checks.FLOATS)
    batch = hidden.shape[0]
    checks.shape("mixer_step", "hidden", hidden, (batch, model))
    checks.int8("mixer_step", "conv_state", conv_state)
    checks.shape("mixer_step", "conv_state", conv_state, (batch, inner, width))
    checks.float32("mixer_step", "ssm_state", ssm_state)
    checks.shape("mixer_step", "ssm_state", ssm_state, (batch, inner, size))
    wide = hidden.float().contiguous()
    out = torch.empty_like(wide)
    library.mixer_step(
        packed,
        wide.data_ptr(),
        out.data_ptr(),
        conv_state.data_ptr(),
        ssm_state.data_ptr(),
        batch,
        torch.get_num_threads(),
    )
    out_dtype: torch.dtype = block[-1]
    return out if out_dtype is torch.float32 else out.to(out_dtype)
