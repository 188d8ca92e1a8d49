"""blocks_step: mixers_step for blocks that are kept."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quamba.ops.block import arguments_of, packed
from quamba.ops.mixers_step import mixers_step_cpu, mixers_step_reference
from quamba.ops.registry import register


def _lists(blocks: Sequence[int]) -> tuple[list[Tensor | None], list[float], list[int]]:
    return packed([arguments_of(number) for number in blocks])


def blocks_step_reference(hidden: Tensor, blocks: Sequence[int], *rest: Any) -> Tensor:
    """`mixers_step` of the blocks' arguments.

    Args:
        hidden: (B, E) any float dtype.
        blocks: the numbers of `quamba.ops.Block`s that are alive.
        out_dtype: float dtype of what every block returns.
        conv_states: for each block int8 (B, D, K), shifted in place.
        ssm_states: for each block float32 (B, D, N), updated in place.

    Returns:
        (B, E) of out_dtype.

    Raises:
        ValueError: there is no block of one of the numbers, or not one state of a kind for each block.
    """
    return mixers_step_reference(hidden, *_lists(blocks), *rest)


def blocks_step_fake(hidden: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(hidden, dtype=arguments[1], memory_format=torch.contiguous_format)


def blocks_step_cpu(hidden: Tensor, blocks: Sequence[int], *rest: Any) -> Tensor:
    """See `blocks_step_reference`."""
    return mixers_step_cpu(hidden, *_lists(blocks), *rest)


blocks_step = register(
    "blocks_step",
    "(Tensor hidden, int[] blocks, ScalarType out_dtype, Tensor(a!)[] conv_states, Tensor(b!)[] ssm_states) -> Tensor",
    reference=blocks_step_reference,
    fake=blocks_step_fake,
    cpu=blocks_step_cpu,
)


def chained(batch: int, *, d_inner: int, d_state: int, dt_rank: int, norm_dbc: bool) -> bool:
    """Whether a CUDA device that `served` says takes such a block is faster with its chain of kernels than with the
    single ops.

    By benchmarks/NOTES.md, which has 17 to 64 sequences of mamba-2.8b; the chain takes no others.

    Args:
        batch: sequences.
        d_inner, d_state, dt_rank: D, N, R.
        norm_dbc: whether d, B and C have RMSNorms.
    """
    fits = d_state == 16 and dt_rank % 16 == 0 and not norm_dbc
    return fits and 16 < batch <= 64 and 4096 <= d_inner <= 5120
