"""The shape of one Mamba block, as data: what an adapter reads from a model and every mixer is built from."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quamba.errors import UnsupportedModelError

# Sites whose scale is a vector where the recipe says "channel", and its length.
_CHANNELS = {"x0": "d_inner", "z": "d_inner", "x": "d_inner", "dt": "d_inner", "B": "d_state", "C": "d_state"}


@dataclass(frozen=True)
class BlockConfig:
    """One block: norm, mixer and, where the block owns it, the residual addition.

    Attributes:
        d_model, d_inner, d_state, d_conv, dt_rank: E, D, N, K, R.
        norm_eps: of the block's RMSNorm.
        in_bias, conv_bias, out_bias: which biases there are (W_dt always has one).
        dbc_norm: RMSNorm on each of d, B and C after W_x: "none", "learned" (Jamba) or "weightless" (Falcon-Mamba).
        dbc_eps: of those norms.
        residual: True where forward returns h + mixer(norm(h)), False where it returns mixer(norm(h)).
        residual_in_fp32: True where the residual stream is kept in float32.
        dtype: of the float weights.
    """

    d_model: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    norm_eps: float
    in_bias: bool
    conv_bias: bool
    out_bias: bool
    dbc_norm: str
    dbc_eps: float
    residual: bool
    residual_in_fp32: bool
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dbc_norm not in ("none", "learned", "weightless"):
            raise UnsupportedModelError(f"found dbc_norm {self.dbc_norm!r}; expected 'none', 'learned' or 'weightless'")

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every float tensor of the block, in the block's own names."""
        width, rank, state = self.d_inner, self.dt_rank, self.d_state
        shapes: dict[str, tuple[int, ...]] = {
            "norm.weight": (self.d_model,),
            "in_proj.weight": (2 * width, self.d_model),
            "conv.weight": (width, self.d_conv),
            "x_proj.weight": (rank + 2 * state, width),
            "dt_proj.weight": (width, rank),
            "dt_bias": (width,),
            "A_log": (width, state),
            "D": (width,),
            "out_proj.weight": (self.d_model, width),
        }
        if self.in_bias:
            shapes["in_proj.bias"] = (2 * width,)
        if self.conv_bias:
            shapes["conv.bias"] = (width,)
        if self.out_bias:
            shapes["out_proj.bias"] = (self.d_model,)
        if self.dbc_norm == "learned":
            shapes |= {"d_norm.weight": (rank,), "B_norm.weight": (state,), "C_norm.weight": (state,)}
        return shapes

    def scale_shape(self, site: str, *, per_channel: bool) -> tuple[int, ...]:
        """The shape of a static site's scale; per channel for the sites that have such scales."""
        return (getattr(self, _CHANNELS[site]),) if per_channel else ()

    def new_state(self, batch: int, device: torch.device, *, conv_dtype: torch.dtype) -> "MixerState":
        """A zero state for that many sequences."""
        return MixerState(
            conv=torch.zeros(batch, self.d_inner, self.d_conv, dtype=conv_dtype, device=device),
            ssm=torch.zeros(batch, self.d_inner, self.d_state, dtype=torch.float32, device=device),
        )


@dataclass
class MixerState:
    """The recurrent state of one mixer; the ops update both tensors in place.

    Attributes:
        conv: (B, D, K), the last K inputs of the convolution, newest last, in the dtype of x0 (int8 or float).
        ssm: float32 (B, D, N).
    """

    conv: Tensor
    ssm: Tensor


class Stateful(Protocol):
    """A mixer: something that makes zero states."""

    def new_state(self, batch: int, device: torch.device) -> MixerState:
        """A zero state for that many sequences."""


def traceable(mixer: Stateful, state: MixerState | None, hidden: Tensor) -> MixerState | None:
    """The state, or under torch.compile a zero one in place of None: inductor takes no None for a mutable argument."""
    if state is None and torch.compiler.is_compiling():
        return mixer.new_state(hidden.shape[0], hidden.device)
    return state
