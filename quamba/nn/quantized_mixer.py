"""The quantized mixer: the same block, passing int8 between its ops."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quamba import numerics, ops
from quamba.errors import QuambaError
from quamba.nn.config import BlockConfig, MixerState, traceable
from quamba.nn.linear import QuantizedLinear
from quamba.nn.route import Route, as_a_whole
from quamba.nn.whole_block import whole_block_arguments
from quamba.ops.mixers_step import served
from quamba.recipe import BlockFormat, QuantSpec


class QuantizedMixer(nn.Module):
    """norm -> in_proj -> conv + SiLU -> x_proj -> dt_proj -> selective scan + gate -> out_proj (+ residual).

    Buffers: `<site>_scale` for each static site, the linears' own, `conv_qweight`, `conv_weight_scale`, and the
    small float tensors in the model's dtype. `finalize` derives from them what the ops read; call it once all
    are filled.
    """

    norm_weight: Tensor
    conv_weight: Tensor
    conv_qweight: Tensor
    conv_weight_scale: Tensor
    conv_bias: Tensor
    d_norm_weight: Tensor
    B_norm_weight: Tensor
    C_norm_weight: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    x0_scale: Tensor
    z_scale: Tensor
    x_scale: Tensor
    d_scale: Tensor
    B_scale: Tensor
    C_scale: Tensor
    dt_scale: Tensor
    g_scale: Tensor
    g_divisor: Tensor
    A: Tensor
    xz_scale: Tensor
    dbc_scale: Tensor
    x_unit_scale: Tensor
    x_scan_scale: Tensor

    def __init__(self, config: BlockConfig, format: BlockFormat, device: torch.device | str = "meta") -> None:
        """Make an empty mixer; fill it with quamba.convert.fill_mixer or from a state dict."""
        super().__init__()
        self.config = config
        self.format = format
        self.route = Route.of(config, format)
        self.ready = False
        c = config

        def float_tensor(name: str, *shape: int, dtype: torch.dtype = c.dtype) -> None:
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))

        def linear(name: str, out_features: int, in_features: int, bias: bool) -> QuantizedLinear:
            return QuantizedLinear(
                in_features=in_features,
                out_features=out_features,
                bias=bias,
                spec=format.weights[name],
                dtype=c.dtype,
                device=device,
            )

        self.in_proj = linear("in_proj", 2 * c.d_inner, c.d_model, c.in_bias)
        self.x_proj = linear("x_proj", c.dt_rank + 2 * c.d_state, c.d_inner, False)
        self.dt_proj = linear("dt_proj", c.d_inner, c.dt_rank, False)
        self.out_proj = linear("out_proj", c.d_model, c.d_inner, c.out_bias)

        float_tensor("norm_weight", c.d_model)
        conv = format.weights["conv"]
        if conv is None:
            float_tensor("conv_weight", c.d_inner, c.d_conv)
        else:
            self.register_buffer("conv_qweight", torch.empty(c.d_inner, c.d_conv, dtype=torch.int8, device=device))
            float_tensor(
                "conv_weight_scale", *((c.d_inner,) if conv.granularity == "channel" else ()), dtype=torch.float32
            )
        if c.conv_bias:
            float_tensor("conv_bias", c.d_inner)
        if c.dbc_norm == "learned":
            float_tensor("d_norm_weight", c.dt_rank)
            float_tensor("B_norm_weight", c.d_state)
            float_tensor("C_norm_weight", c.d_state)
        float_tensor("dt_bias", c.d_inner)
        float_tensor("A_log", c.d_inner, c.d_state)
        float_tensor("D", c.d_inner)

        for site, spec in format.activations.items():
            if spec is not None and spec.granularity != "token":
                float_tensor(f"{site}_scale", *self.scale_shape(site, spec), dtype=torch.float32)
        if format.step("smooth_output") is not None:
            float_tensor("g_divisor", c.d_inner)
        for name, shape in self._derived_shapes().items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.float32, device=device), persistent=False)
        self.eval()

    def scale_shape(self, site: str, spec: QuantSpec) -> tuple[int, ...]:
        """The shape of a static site's scale."""
        return self.config.scale_shape(site, per_channel=spec.granularity == "channel")

    def _derived_shapes(self) -> dict[str, tuple[int, ...]]:
        c = self.config
        shapes: dict[str, tuple[int, ...]] = {"A": (c.d_inner, c.d_state)}
        if self.route.fused_xz:
            shapes["xz_scale"] = (2 * c.d_inner,)
        if self.route.static_dbc:
            shapes["dbc_scale"] = (c.dt_rank + 2 * c.d_state,)
        if self.route.channel_x:
            shapes["x_unit_scale"] = ()
        if self.route.smooth_g:
            shapes["x_scan_scale"] = (c.d_inner,)
        return shapes

    @torch.no_grad()
    def finalize(self) -> None:
        """Derive what the ops read from the filled buffers.

        Raises:
            QuambaError: a buffer is still on the meta device.
        """
        empty = [name for name, buffer in self.named_buffers() if buffer.is_meta and name not in self._derived_shapes()]
        if empty:
            raise QuambaError(f"found empty buffers {empty} in a quantized mixer; expected all of them to be filled")
        c = self.config
        self.A = -torch.exp(self.A_log.to(torch.float32))
        for static, name, sites, widths in (
            (self.route.fused_xz, "xz_scale", ("x0", "z"), (c.d_inner, c.d_inner)),
            (self.route.static_dbc, "dbc_scale", ("d", "B", "C"), (c.dt_rank, c.d_state, c.d_state)),
        ):
            if static:
                parts = [getattr(self, f"{s}_scale").expand(w) for s, w in zip(sites, widths, strict=True)]
                setattr(self, name, torch.cat(parts))
        if self.route.channel_x:
            self.x_unit_scale = torch.ones((), dtype=torch.float32, device=self.A.device)
        if self.route.smooth_g:
            # A rotated x is dequantized before the scan: its scale is spent.
            divisor = self.g_divisor.to(torch.float32)
            self.x_scan_scale = (self.x_scale if self.route.static_x else torch.ones_like(divisor)) / divisor
        self.ready = True
        self._collect()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedMixer":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._collect()
        return self

    def _collect(self) -> None:
        """Gather the arguments of the ops for whole blocks once: reading thirty buffers takes longer than some ops."""
        self.step_arguments: tuple[Any, ...] | None = None
        self.block: ops.Block | None = None
        self.scan_vectors = (self.dt_bias, self.D)
        if self.ready and self.A.is_cuda:
            # The type that the step of the scan for many sequences is compiled for.
            self.scan_vectors = (self.dt_bias.to(torch.float32), self.D.to(torch.float32))
        if not (self.ready and self.route.one_step):
            return
        block, c = whole_block_arguments(self), self.config
        sizes = {"d_model": c.d_model, "d_inner": c.d_inner, "d_state": c.d_state, "dt_rank": c.dt_rank}
        if served(self.A.device, **sizes, rotate=self.route.rotate_g):
            self.step_arguments = block
        self.block = ops.Block(*block)

    def state_dtype(self) -> torch.dtype:
        """The dtype of the convolution's state: int8, or float where x0 is."""
        return torch.float32 if self.format.activations["x0"] is None else torch.int8

    def new_state(self, batch: int, device: torch.device) -> MixerState:
        """A zero state for that many sequences."""
        return self.config.new_state(batch, device, conv_dtype=self.state_dtype())

    def wide_dtype(self, like: Tensor) -> torch.dtype:
        """The dtype of what stays float between two ops: float32 on a CPU, where half precision gains nothing."""
        return torch.float32 if like.device.type == "cpu" else self.config.dtype

    def _normed(self, value: Tensor, site: str, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
        """RMSNorm, then the site's quantization: (int8, scale), or (float, None)."""
        if self.format.granularity(site) in ("tensor", "channel"):
            scale = getattr(self, f"{site}_scale")
            return ops.rms_norm_quant(value, weight, scale, eps), scale
        wide = value.to(torch.float32)
        wide = F.rms_norm(wide, wide.shape[-1:], None if weight is None else weight.to(torch.float32), eps)
        return self._at_run_time(wide, site)

    def _at_run_time(self, value: Tensor, site: str) -> tuple[Tensor, Tensor | None]:
        """The site's quantization of a float value: (int8, scale), or (float, None)."""
        granularity = self.format.granularity(site)
        if granularity is None:
            return value, None
        if granularity == "token":
            q, scale = ops.quantize_per_token(value)
            return q, scale
        scale = getattr(self, f"{site}_scale")
        return ops.quantize(value, scale), scale

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, state: MixerState | None = None) -> Tensor:
        """Run the block.

        Args:
            hidden: (B, L, E) any float dtype.
            mask: (B, L), 0 at padding, or None.
            state: left context, updated in place; None for a zero start whose end is not kept.

        Returns:
            (B, L, E): h + mixer(norm(h)) where the block owns the residual, else mixer(norm(h)).

        Raises:
            QuambaError: the mixer has not been filled and finalized.
        """
        if not self.ready:
            raise QuambaError("found a quantized mixer without values; expected it to be filled and finalized first")
        c, route = self.config, self.route
        state = traceable(self, state, hidden)
        # One token with a state goes through the single-step ops, without the length dimension.
        step = state is not None and hidden.shape[1] == 1 and mask is None
        if step:
            hidden = hidden[:, 0]
            few = not hidden.is_cuda or as_a_whole(c, hidden.shape[0])
            if state is not None and few and self.step_arguments is not None:
                out_dtype = torch.float32 if c.residual and c.residual_in_fp32 else hidden.dtype
                token: Tensor
                if hidden.is_cuda and self.block is not None and not ops.watched():
                    token = ops.blocks_step(hidden, [self.block.number], out_dtype, [state.conv], [state.ssm])
                else:
                    token = ops.mixer_step(hidden, *self.step_arguments, out_dtype, state.conv, state.ssm)
                return token[:, None]
        wide = self.wide_dtype(hidden)
        # A CPU gains nothing by one op for all.
        if not step and hidden.is_cuda and self.block is not None and not ops.watched():
            out_dtype = torch.float32 if c.residual and c.residual_in_fp32 else hidden.dtype
            states: tuple[list[Tensor], list[Tensor]] = ([], []) if state is None else ([state.conv], [state.ssm])
            sequence: Tensor = ops.blocks_prefill(hidden, [self.block.number], wide, out_dtype, mask, *states)
            return sequence

        u, u_scale = self._normed(hidden, "u", self.norm_weight, c.norm_eps)
        fused = step and hidden.is_cuda  # ops that save a CUDA device a launch; a CPU gains nothing by them
        x0_scale: Tensor | None
        x_scale: Tensor | None
        z_scale: Tensor | None
        if state is not None and fused and route.fused_conv:
            product = (self.in_proj.qweight, self.in_proj.weight_scale, self.in_proj.bias, self.xz_scale)
            conv = (self.conv_qweight, self.conv_weight_scale, self.conv_bias if c.conv_bias else None, self.x_scale)
            x, z = ops.linear_conv1d_step(u, u_scale, *product, *conv, state.conv)
            x_scale, z_scale = self.x_scale, self.z_scale
        else:
            if route.fused_xz:
                x0, z = self.in_proj(u, u_scale, out_dtype=torch.int8, out_scale=self.xz_scale).split(c.d_inner, dim=-1)
                x0_scale, z_scale = self.x0_scale, self.z_scale
            else:
                x0, z = self.in_proj(u, u_scale, out_dtype=wide).split(c.d_inner, dim=-1)
                x0, x0_scale = self._at_run_time(x0, "x0")
                z, z_scale = self._at_run_time(z, "z")
            x, x_scale = self._conv(x0, x0_scale, wide=wide, mask=mask, state=state, step=step)
        x_in, x_in_scale = x, x_scale
        if route.rotate_x:
            x_in, x_in_scale = self._rotated(x, "x")
            x, x_scale = ops.hadamard_inverse(numerics.dequantize(x_in, x_in_scale)), None
        elif route.token_x:
            x, x_scale = numerics.dequantize(x, x_scale), None
        if route.channel_x:
            x_in_scale = self.x_unit_scale
        if route.smooth_g:
            x_scale = self.x_scan_scale

        d, d_scale, B, B_scale, C, C_scale = self._dbc(x_in, x_in_scale, wide=wide)
        dt_scale = self.dt_scale if route.static_dt else None
        g_scale = self.g_scale if route.static_g else None
        scan_scale = None if route.rotate_g else g_scale
        scan_dtype = wide if scan_scale is None else torch.int8
        dt_bias, D = self.scan_vectors if step else (self.dt_bias, self.D)
        scan = (dt_bias, self.A, B, B_scale, C, C_scale, D, z, z_scale, scan_scale, scan_dtype)
        if state is not None and fused and route.fused_dt:
            weight = (self.dt_proj.qweight, self.dt_proj.weight_scale)
            g = ops.selective_scan_dt_step(x, x_scale, d, d_scale, *weight, dt_scale, *scan, state.ssm)
        else:
            dt = self.dt_proj(d, d_scale, out_dtype=torch.int8 if route.static_dt else wide, out_scale=dt_scale)
            if step and state is not None:
                g = ops.selective_scan_step(x, x_scale, dt, dt_scale, *scan, state.ssm)
            else:
                g = ops.selective_scan(x, x_scale, dt, dt_scale, *scan, None if state is None else state.ssm)
        if route.rotate_g:
            g, g_scale = self._rotated(g, "g")
        elif not route.static_g:
            g, g_scale = self._at_run_time(g, "g")

        residual = None
        if c.residual:
            residual = hidden.to(torch.float32) if c.residual_in_fp32 else hidden
        out: Tensor = self.out_proj(
            g, g_scale, out_dtype=hidden.dtype if residual is None else residual.dtype, residual=residual
        )
        return out[:, None] if step else out

    def _rotated(self, value: Tensor, site: str) -> tuple[Tensor, Tensor | None]:
        """Hadamard transform, then the site's quantization."""
        if self.format.granularity(site) == "tensor":
            scale = getattr(self, f"{site}_scale")
            return ops.hadamard_quant(value, scale), scale
        return self._at_run_time(ops.hadamard(value), site)

    def _conv(
        self,
        x0: Tensor,
        x0_scale: Tensor | None,
        *,
        wide: torch.dtype,
        mask: Tensor | None,
        state: MixerState | None,
        step: bool,
    ) -> tuple[Tensor, Tensor | None]:
        x_scale = self.x_scale if self.route.static_x else None
        quantized = self.route.conv
        args = (
            x0 if x0_scale is not None else x0.to(torch.float32),
            x0_scale,
            self.conv_qweight if quantized else self.conv_weight,
            self.conv_weight_scale if quantized else None,
            self.conv_bias if self.config.conv_bias else None,
            x_scale,
            wide if x_scale is None else torch.int8,
        )
        if step and state is not None:
            x = ops.causal_conv1d_step(*args, state.conv)
        else:
            x = ops.causal_conv1d(*args, mask, None if state is None else state.conv)
        if self.route.token_x and not self.route.rotate_x:
            return self._at_run_time(x, "x")
        return x, x_scale

    def _dbc(
        self, x: Tensor, x_scale: Tensor | None, *, wide: torch.dtype
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None]:
        c = self.config
        sizes = [c.dt_rank, c.d_state, c.d_state]
        if self.route.fused_dbc:
            d, B, C = self.x_proj(x, x_scale, out_dtype=torch.int8, out_scale=self.dbc_scale).split(sizes, dim=-1)
            return d, self.d_scale, B, self.B_scale, C, self.C_scale
        d, B, C = self.x_proj(x, x_scale, out_dtype=wide).split(sizes, dim=-1)
        if c.dbc_norm == "none":
            return (*self._at_run_time(d, "d"), *self._at_run_time(B, "B"), *self._at_run_time(C, "C"))
        learned = c.dbc_norm == "learned"
        return (
            *self._normed(d, "d", self.d_norm_weight if learned else None, c.dbc_eps),
            *self._normed(B, "B", self.B_norm_weight if learned else None, c.dbc_eps),
            *self._normed(C, "C", self.C_norm_weight if learned else None, c.dbc_eps),
        )
