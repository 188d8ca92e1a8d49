"""The ops of quamba: integer arithmetic under one name and one schema per op, on every device.

B batch, L sequence length, E d_model, D inner width, N state size, K conv width, R dt rank.
"""

from quamba.ops.block import Block
from quamba.ops.blocks_prefill import blocks_prefill
from quamba.ops.blocks_step import blocks_step
from quamba.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from quamba.ops.embedding import embedding
from quamba.ops.hadamard_inverse import hadamard_inverse
from quamba.ops.hadamard_quant import hadamard, hadamard_quant
from quamba.ops.linear import linear
from quamba.ops.linear_conv1d_step import linear_conv1d_step
from quamba.ops.mixer_step import mixer_step
from quamba.ops.mixers_step import mixers_step
from quamba.ops.quantize import quantize, quantize_per_token
from quamba.ops.registry import OPS, Op, reference, references_forced, watched
from quamba.ops.rms_norm_quant import rms_norm_quant
from quamba.ops.selective_scan import selective_scan, selective_scan_dt_step, selective_scan_step

from quamba.ops import cuda as cuda  # isort: skip  # after the ops, whose kernels it registers

__all__ = [
    "OPS",
    "Block",
    "Op",
    "blocks_prefill",
    "blocks_step",
    "causal_conv1d",
    "causal_conv1d_step",
    "embedding",
    "hadamard",
    "hadamard_inverse",
    "hadamard_quant",
    "linear",
    "linear_conv1d_step",
    "mixer_step",
    "mixers_step",
    "quantize",
    "quantize_per_token",
    "reference",
    "references_forced",
    "rms_norm_quant",
    "selective_scan",
    "selective_scan_dt_step",
    "selective_scan_step",
    "watched",
]
