"""What the ops for a whole block take of a quantized mixer, in the order of their schema."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quamba.nn.quantized_mixer import QuantizedMixer


def whole_block_arguments(mixer: "QuantizedMixer") -> tuple[Any, ...]:
    """The arguments of `mixer_step` between its hidden states and the dtype of its result (quamba.ops.block).

    Args:
        mixer: filled and finalized, of a route that one op covers (`Route.one_step`).
    """
    route, c = mixer.route, mixer.config
    learned = c.dbc_norm == "learned"
    return (
        mixer.norm_weight,
        c.norm_eps,
        mixer.u_scale,
        mixer.in_proj.qweight,
        mixer.in_proj.weight_scale,
        _wide(mixer.in_proj.bias),
        mixer.xz_scale,
        mixer.conv_qweight,
        mixer.conv_weight_scale,
        _wide(mixer.conv_bias) if c.conv_bias else None,
        mixer.x_scale,
        mixer.x_proj.qweight,
        mixer.x_proj.weight_scale,
        mixer.x_unit_scale if route.channel_x else mixer.x_scale,
        mixer.x_scan_scale if route.smooth_g else mixer.x_scale,
        _wide(mixer.d_norm_weight) if learned else None,
        _wide(mixer.B_norm_weight) if learned else None,
        _wide(mixer.C_norm_weight) if learned else None,
        None if c.dbc_norm == "none" else c.dbc_eps,
        mixer.dbc_scale,
        mixer.dt_proj.qweight,
        mixer.dt_proj.weight_scale,
        mixer.dt_scale if route.static_dt else None,
        _wide(mixer.dt_bias),
        mixer.A,
        _wide(mixer.D),
        route.rotate_g,
        mixer.g_scale,
        mixer.out_proj.qweight,
        mixer.out_proj.weight_scale,
        _wide(mixer.out_proj.bias),
        c.residual,
    )


def _wide(vector: Tensor | None) -> Tensor | None:
    """The kernels read float32: converted once, not in every call."""
    return None if vector is None else vector.to(torch.float32)
