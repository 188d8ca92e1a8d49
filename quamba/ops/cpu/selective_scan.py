"""selective_scan on the CPU: chunks of the sequence side by side, in blocks that stay in the cache.

With a_t = exp(dt_t A) and b_t = dt_t B_t x_t, a segment of the sequence is cut in chunks of equal length, and position
t of all chunks is advanced at once from a zero start: h_t = a_t h_(t-1) + b_t and p_t = a_t p_(t-1). The states
S at the starts of the chunks then follow one after the other, S' = p_last S + h_last, and h_t + p_t S is exact.
The channels are the contiguous dimension, so that every inner loop is long; the state is (.., N, D) inside.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba import numerics
from quamba.ops import checks, native

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
    return y.reshape(batch, padded, inner)[:, :length]


def _check(
    op: str,
    x: Tensor,
    inner: tuple[tuple[str, Tensor | None, Tensor | None], ...],
    state_wide: tuple[tuple[str, Tensor, Tensor | None], ...],
    vectors: tuple[Tensor, Tensor],
    A: Tensor,
    out_scale: Tensor | None,
    out_dtype: torch.dtype,
    state: Tensor | None,
) -> None:
    """The checks that prefill and step share: (name, tensor, scale) of the tensors (..., D) and (..., N)."""
    checks.float32(op, "A", A)
    checks.dims(op, "A", A, 2)
    leading = x.shape[:-1]
    for group, size in ((inner, A.shape[0]), (state_wide, A.shape[1])):
        for name, tensor, scale in group:
            if tensor is not None:
                checks.dtype(op, name, tensor, checks.INT8_OR_FLOAT)
                checks.shape(op, name, tensor, (*leading, size))
            checks.scale(op, f"{name}_scale", scale, size)
    checks.vector(op, "dt_bias", vectors[0], A.shape[0])
    checks.vector(op, "D", vectors[1], A.shape[0])
    checks.scale(op, "out_scale", out_scale, A.shape[0])
    checks.output(op, out_scale, out_dtype)
    if state is not None:
        checks.float32(op, "state", state)
        checks.shape(op, "state", state, (leading[0], *A.shape))


def _plain(value: Tensor) -> Tensor:
    """The same values as int8 or float32, the last dimension contiguous."""
    value = value if value.dtype is torch.int8 else value.float()
    return value if value.stride(-1) == 1 else value.contiguous()


def _native(
    inputs: dict[str, Tensor],
    scales: dict[str, Tensor | None],
    vectors: dict[str, Tensor],
    out_dtype: torch.dtype,
    state: Tensor | None,
) -> Tensor:
    """The scan in quamba/_cpu: `inputs` are x, dt, B, C and z where there is one, `scales` all six by name."""
    plain = {name: _plain(tensor) for name, tensor in inputs.items()}
    x = plain["x"]
    floats = {name: native.float32(tensor) for name, tensor in vectors.items()}
    kept = {name: native.scale(scale) for name, scale in scales.items()}
    carried = None if state is None else state.contiguous()
    out = torch.empty(x.shape, dtype=torch.int8 if out_dtype is torch.int8 else torch.float32, device="cpu")
    values: dict[str, Tensor | float | None] = {"z": None, "z_int8": 0, "z_batch_stride": 0, "z_stride": 0}
    for name, tensor in plain.items():
        values[name] = tensor
        values[f"{name}_int8"] = tensor.dtype is torch.int8
        values[f"{name}_batch_stride"], values[f"{name}_stride"], _ = tensor.stride()
    batch, length, inner = x.shape
    native.run(
        "selective_scan",
        batch=batch,
        length=length,
        d_inner=inner,
        d_state=vectors["A"].shape[1],
        threads=torch.get_num_threads(),
        out=out,
        state=carried,
        **values,
        **floats,
        **{f"{name}_scale": scale for name, scale in kept.items()},
    )
    if state is not None and carried is not state and carried is not None:
        state.copy_(carried)
    return out if out.dtype is out_dtype else out.to(out_dtype)


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
    checks.dims("selective_scan", "x", x, 3)
    _check(
        "selective_scan",
        x,
        (("x", x, x_scale), ("dt", dt, dt_scale), ("z", z, z_scale)),
        (("B", B, B_scale), ("C", C, C_scale)),
        (dt_bias, D),
        A,
        out_scale,
        out_dtype,
        state,
    )
    if native.available() and A.shape[1] > 0:
        return _native(
            {"x": x, "dt": dt, "B": B, "C": C} | ({} if z is None else {"z": z}),
            {"x": x_scale, "dt": dt_scale, "B": B_scale, "C": C_scale, "z": z_scale, "out": out_scale},
            {"dt_bias": dt_bias, "A": A, "D": D},
            out_dtype,
            state,
        )
    x, dt, B, C = (
        numerics.dequantize(value, scale) for value, scale in ((x, x_scale), (dt, dt_scale), (B, B_scale), (C, C_scale))
    )
    dt = F.softplus(dt + dt_bias)
    shape = (x.shape[0], A.shape[1], A.shape[0])
    carried = x.new_zeros(shape) if state is None else state.transpose(1, 2).contiguous()
    y = _scan(dt, x, A.t().contiguous(), B, C, carried) if x.numel() else torch.zeros_like(x)
    if state is not None:
        state.copy_(carried.transpose(1, 2))
    y.addcmul_(x, D.float())
    if z is not None:
        y.mul_(F.silu(numerics.dequantize(z, z_scale), inplace=True))
    return y.to(out_dtype) if out_scale is None else numerics.to_int8_(y.div_(out_scale))


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
    checks.dims("selective_scan_step", "x", x, 2)
    _check(
        "selective_scan_step",
        x,
        (("x", x, x_scale), ("dt", dt, dt_scale), ("z", z, z_scale)),
        (("B", B, B_scale), ("C", C, C_scale)),
        (dt_bias, D),
        A,
        out_scale,
        out_dtype,
        state,
    )
    x = numerics.dequantize(x, x_scale)
    dt = F.softplus(numerics.dequantize(dt, dt_scale) + dt_bias)
    state.mul_((dt.unsqueeze(2) * A).exp_())
    state.addcmul_((dt * x).unsqueeze(2), numerics.dequantize(B, B_scale).unsqueeze(1))
    y = torch.bmm(state, numerics.dequantize(C, C_scale).unsqueeze(2)).squeeze(2)
    y.addcmul_(x, D.float())
    if z is not None:
        y.mul_(F.silu(numerics.dequantize(z, z_scale)))
    return y.to(out_dtype) if out_scale is None else numerics.to_int8_(y.div_(out_scale))
