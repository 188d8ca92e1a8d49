"""selective_scan on the CPU: chunks of the sequence side by side, in blocks that stay in the cache.

With a_t = exp(dt_t A) and b_t = dt_t B_t x_t, a segment of the sequence is cut in chunks of equal length, and position
t of all chunks is advanced at once from a zero start: h_t = a_t h_(t-1) + b_t and p_t = a_t p_(t-1). The states
S at the starts of the chunks then follow one after the other, S' = p_last S + h_last, and h_t + p_t S is exact.
The channels are the contiguous dimension, so that every inner loop is long; the state is (.., N, D) inside.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba import numerics
from quamba.ops import checks, native
from quamba.ops.cache import Derived
from quamba.ops.cpu.selective_scan_native import selective_scan_native

# Elements advanced by one call, about where two cores begin to pay; and elements of a work buffer, of which
# there are two, float32: together they fit the second-level caches.
_STEP = 1 << 15
_BUFFER = 1 << 18


def _padded(value: Tensor, length: int) -> Tensor:
    """(B, L, D) -> (B, length, D), zeros after L."""
    return value if value.shape[1] == length else F.pad(value, (0, 0, 0, length - value.shape[1]))


class _Block:
    """Work buffers for `rows` batch rows and `width` channels; `advance` takes them through one segment."""

    def __init__(self, *, steps: int, rows: int, chunks: int, size: int, width: int):
        def buffer(*shape: int) -> Tensor:
            return torch.empty(*shape, size, width, dtype=torch.float32, device="cpu")

        self.decays, self.states = buffer(steps, rows, chunks), buffer(steps, rows, chunks)
        self.starts = buffer(rows, chunks + 1)  # the state before each chunk, and after the last
        self.decay_at, self.state_at = self.decays.unbind(0), self.states.unbind(0)
        self.last = list(zip(self.state_at[-1].unbind(1), self.decay_at[-1].unbind(1), strict=True))
        self.start_at = self.starts.unbind(1)

    def advance(self, dt: Tensor, dtx: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """dt, dtx (T, rows, chunks, D); A (N, D); B, C (T, rows, chunks, N) -> y like dt.

        The state goes in as start_at[0] and comes out as start_at[-1].
        """
        torch.mul(dt.unsqueeze(-2), A, out=self.decays).exp_()
        torch.mul(dtx.unsqueeze(-2), B.unsqueeze(-1), out=self.states)
        if len(self.last) == 1:
            previous = self.starts[:, :1]
            for state, decay in zip(self.state_at, self.decay_at, strict=True):
                previous = state.addcmul_(decay, previous)
            self.start_at[-1].copy_(previous.squeeze(1))
        else:
            for t in range(1, len(self.state_at)):
                self.state_at[t].addcmul_(self.decay_at[t], self.state_at[t - 1])
                self.decay_at[t].mul_(self.decay_at[t - 1])
            for chunk, (state, decay) in enumerate(self.last):
                torch.addcmul(state, decay, self.start_at[chunk], out=self.start_at[chunk + 1])
            self.states.addcmul_(self.decays, self.starts[:, :-1])
        return torch.matmul(C.unsqueeze(-2), self.states).squeeze(-2)


def _scan(dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """dt (after softplus), x (B, L, D); A (N, D); B, C (B, L, N); state (B, N, D), updated; float32 -> y (B, L, D)."""
    batch, length, inner = x.shape
    size = len(A)
    width = min(inner, max(1, _STEP // size))
    rows = min(batch, max(1, _STEP // (size * width)))
    step = rows * size * width
    tokens = math.ceil(length / math.ceil(length * step / _BUFFER))
    chunks = min(math.ceil(_STEP / step), round(math.sqrt(tokens)))
    steps = math.ceil(tokens / chunks)
    segments = math.ceil(length / (steps * chunks))
    padded = segments * chunks * steps
    split = (batch, segments, chunks, steps, -1)
    dt, dtx, B, C = (
        _padded(value, padded).reshape(split).permute(1, 3, 0, 2, 4)  # (segment, T, B, chunk, .)
        for value in (dt, dt * x, B, C)
    )
    y = x.new_empty((batch, segments, chunks, steps, inner))
    out = y.permute(1, 3, 0, 2, 4)
    blocks: dict[tuple[int, int], _Block] = {}
    for channels, row in itertools.product(range(0, inner, width), range(0, batch, rows)):
        columns = slice(channels, min(channels + width, inner))
        lines = slice(row, min(row + rows, batch))
        shape = (lines.stop - lines.start, columns.stop - columns.start)
        if shape not in blocks:
            blocks[shape] = _Block(steps=steps, rows=shape[0], chunks=chunks, size=size, width=shape[1])
        block = blocks[shape]
        block.start_at[0].copy_(state[lines, :, columns])
        for s in range(segments):
            at = (s, slice(None), lines)
            here = (*at, slice(None), columns)
            out[here] = block.advance(dt[here], dtx[here], A[:, columns], B[at], C[at])
            block.start_at[0].copy_(block.start_at[-1])
        state[lines, :, columns] = block.start_at[-1]
    return y.reshape(batch, padded, inner)[:, :length].contiguous()


class _Parameters(NamedTuple):
    """What is derived from the parameters: float32, and scales that are vectors, or None."""

    A: Tensor  # transposed: (N, D)
    dt_bias: Tensor
    D: Tensor
    x_scale: Tensor | None
    dt_scale: Tensor | None
    z_scale: Tensor | None
    B_scale: Tensor | None
    C_scale: Tensor | None


def _vector(scale: Tensor | None, size: int) -> Tensor | None:
    return None if scale is None else scale.expand(size).clone()


def _scaled(value: Tensor, scale: Tensor | None) -> Tensor:
    """value * scale in float32. int8 * float32 vector is float32: one call, which counts in a step of twenty."""
    if scale is None or value.dtype is not torch.int8:
        return numerics.dequantize(value, scale)
    return value * scale


def _prepare(A: Tensor, dt_bias: Tensor, D: Tensor, *scales: Tensor | None) -> _Parameters:
    """scales: of x, dt, z, the result; B, C."""
    op = "selective_scan"
    checks.float32(op, "A", A)
    checks.dims(op, "A", A, 2)
    inner, size = A.shape
    checks.vector(op, "dt_bias", dt_bias, inner)
    checks.vector(op, "D", D, inner)
    for name, scale in zip(("x", "dt", "z", "out"), scales[:4], strict=True):
        checks.scale(op, f"{name}_scale", scale, inner)
    for name, scale in zip(("B", "C"), scales[4:], strict=True):
        checks.scale(op, f"{name}_scale", scale, size)
    return _Parameters(
        A=A.t().clone(memory_format=torch.contiguous_format),
        dt_bias=dt_bias.to(torch.float32, copy=True),
        D=D.to(torch.float32, copy=True),
        x_scale=_vector(scales[0], inner),
        dt_scale=_vector(scales[1], inner),
        z_scale=_vector(scales[2], inner),
        B_scale=_vector(scales[4], size),
        C_scale=_vector(scales[5], size),
    )


_parameters = Derived(_prepare)


def _check_inputs(
    op: str, A: Tensor, x: Tensor, dt: Tensor, z: Tensor | None, B: Tensor, C: Tensor, state: Tensor | None
) -> None:
    inner, size = A.shape
    leading = x.shape[:-1]
    wide, narrow = (*leading, inner), (*leading, size)
    types = checks.INT8_OR_FLOAT
    # The plain comparisons first: this runs for every token, and naming the culprit takes longer.
    if (
        x.shape == dt.shape == wide
        and B.shape == C.shape == narrow
        and x.dtype in types
        and dt.dtype in types
        and B.dtype in types
        and C.dtype in types
        and (z is None or (z.shape == wide and z.dtype in types))
        and (state is None or (state.shape == (leading[0], inner, size) and state.dtype is torch.float32))
    ):
        return
    for name, tensor, shape in (("x", x, wide), ("dt", dt, wide), ("z", z, wide), ("B", B, narrow), ("C", C, narrow)):
        if tensor is not None:
            checks.dtype(op, name, tensor, types)
            checks.shape(op, name, tensor, shape)
    if state is not None:
        checks.float32(op, "state", state)
        checks.shape(op, "state", state, (leading[0], inner, size))


def selective_scan_cpu(
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
    """See `selective_scan_reference`."""
    parameters = _parameters(A, dt_bias, D, x_scale, dt_scale, z_scale, out_scale, B_scale, C_scale)
    checks.dims("selective_scan", "x", x, 3)
    checks.output("selective_scan", out_scale, out_dtype)
    _check_inputs("selective_scan", A, x, dt, z, B, C, state)
    if native.available() and A.shape[1] > 0:
        return selective_scan_native(
            inputs={"x": x, "dt": dt, "B": B, "C": C} | ({} if z is None else {"z": z}),
            scales={"x": x_scale, "dt": dt_scale, "B": B_scale, "C": C_scale, "z": z_scale, "out": out_scale},
            vectors={"dt_bias": dt_bias, "A": A, "D": D},
            out_dtype=out_dtype,
            state=state,
        )
    x, dt, B, C = (
        numerics.dequantize(value, scale) for value, scale in ((x, x_scale), (dt, dt_scale), (B, B_scale), (C, C_scale))
    )
    dt = F.softplus(dt + parameters.dt_bias)
    shape = (x.shape[0], A.shape[1], A.shape[0])
    carried = x.new_zeros(shape) if state is None else state.transpose(1, 2).contiguous()
    y = _scan(dt, x, parameters.A, B, C, carried) if x.numel() else torch.zeros_like(x)
    if state is not None:
        state.copy_(carried.transpose(1, 2))
    y.addcmul_(x, parameters.D)
    if z is not None:
        y.mul_(F.silu(numerics.dequantize(z, z_scale), inplace=True))
    return numerics.finish_(y, out_scale, out_dtype)


def selective_scan_step_cpu(
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
    """See `selective_scan_step_reference`."""
    parameters = _parameters(A, dt_bias, D, x_scale, dt_scale, z_scale, out_scale, B_scale, C_scale)
    checks.dims("selective_scan_step", "x", x, 2)
    checks.output("selective_scan_step", out_scale, out_dtype)
    _check_inputs("selective_scan_step", A, x, dt, z, B, C, state)
    x = _scaled(x, parameters.x_scale)
    dt = F.softplus(_scaled(dt, parameters.dt_scale) + parameters.dt_bias)
    drive = (dt * x).unsqueeze(2)
    state.mul_((dt.unsqueeze(2) * A).exp_())
    state.addcmul_(drive, _scaled(B, parameters.B_scale).unsqueeze(1))
    y = torch.bmm(state, _scaled(C, parameters.C_scale).unsqueeze(2)).squeeze(2)
    y.addcmul_(x, parameters.D)
    if z is not None:
        y.mul_(F.silu(_scaled(z, parameters.z_scale)))
    return numerics.finish_(y, out_scale, out_dtype)
