"""mixers_step: one token per sequence through a stack of blocks whose sites are all static int8, in one call."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from quamba.hadamard import decompose
from quamba.ops.block import DBC_EPS, FLAGS, FLOATS, NORM_EPS, RESIDUAL, ROTATE, TENSORS
from quamba.ops.mixer_step import mixer_step_cpu, mixer_step_reference
from quamba.ops.registry import register


def _unpacked(
    tensors: Sequence[Tensor | None], floats: Sequence[float], flags: Sequence[int], count: int
) -> Iterator[list[Any]]:
    """Inverse of `packed`."""
    for block in range(count):
        norm_eps, dbc_eps = floats[FLOATS * block : FLOATS * (block + 1)]
        norm_dbc, rotate, residual = flags[FLAGS * block : FLAGS * (block + 1)]
        arguments: list[Any] = list(tensors[TENSORS * block : TENSORS * (block + 1)])
        arguments.insert(NORM_EPS, norm_eps)
        arguments.insert(DBC_EPS, dbc_eps if norm_dbc else None)
        arguments.insert(ROTATE, bool(rotate))
        arguments.insert(RESIDUAL, bool(residual))
        yield arguments


def _check(tensors: Sequence[Any], floats: Sequence[Any], flags: Sequence[Any], *states: Sequence[Tensor]) -> None:
    counts = [len(states[0]), len(states[1]), len(tensors), len(floats), len(flags)]
    expected = [len(states[0]) * n for n in (1, 1, TENSORS, FLOATS, FLAGS)]
    if counts != expected or not states[0]:
        raise ValueError(
            f"mixers_step: found {counts} conv states, ssm states, tensors, floats and flags; expected {expected} "
            "for at least one block (quamba.ops.block.packed)"
        )


def _through(
    step: Callable[..., Tensor],
    hidden: Tensor,
    tensors: Sequence[Tensor | None],
    floats: Sequence[float],
    flags: Sequence[int],
    out_dtype: torch.dtype,
    conv_states: Sequence[Tensor],
    ssm_states: Sequence[Tensor],
) -> Tensor:
    """The blocks one after the other, by one implementation of `mixer_step`. Arguments as for the reference."""
    _check(tensors, floats, flags, conv_states, ssm_states)
    blocks = _unpacked(tensors, floats, flags, len(conv_states))
    for arguments, conv, ssm in zip(blocks, conv_states, ssm_states, strict=True):
        hidden = step(hidden, *arguments, out_dtype, conv, ssm)
    return hidden


def mixers_step_reference(hidden: Tensor, *lists: Any) -> Tensor:
    """`mixer_step` for one block after the other: what leaves one, in out_dtype, enters the next.

    Args:
        hidden: (B, E) any float dtype.
        tensors, floats, flags: what `packed` makes of the blocks' arguments.
        out_dtype: float dtype of what every block returns.
        conv_states: for each block int8 (B, D, K), shifted in place.
        ssm_states: for each block float32 (B, D, N), updated in place.

    Returns:
        (B, E) of out_dtype.

    Raises:
        ValueError: the lists do not hold whole blocks.
    """
    return _through(mixer_step_reference, hidden, *lists)


def mixers_step_fake(hidden: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(hidden, dtype=arguments[3], memory_format=torch.contiguous_format)


def mixers_step_cpu(hidden: Tensor, *lists: Any) -> Tensor:
    """See `mixers_step_reference`."""
    return _through(mixer_step_cpu, hidden, *lists)


mixers_step = register(
    "mixers_step",
    "(Tensor hidden, Tensor?[] tensors, float[] floats, int[] flags, ScalarType out_dtype,"
    " Tensor(a!)[] conv_states, Tensor(b!)[] ssm_states) -> Tensor",
    reference=mixers_step_reference,
    fake=mixers_step_fake,
    cpu=mixers_step_cpu,
)

_CUDA_BASES = (1, 12, 20)  # kStackHadamards of csrc/include/quamba/mixers_step.cuh
_CUDA_MOST = {"d_model": 8192, "d_inner": 8192, "d_state": 32, "dt_rank": 256}


def most_tokens(d_inner: int) -> int:
    """Sequences up to which a CUDA device is faster with the whole blocks than with the single ops.

    By benchmarks/NOTES.md; the states and operands of more do not leave a wide block's weights enough shared memory.

    Args:
        d_inner: D.
    """
    return 16 if d_inner <= 5120 else 8


def served(device: torch.device, *, d_model: int, d_inner: int, d_state: int, dt_rank: int, rotate: bool) -> bool:
    """Whether `mixer_step` and `mixers_step` take blocks of this shape on that device.

    The CUDA kernel needs the asynchronous copies of compute capability 9, and has limits; where it does not serve, a
    block takes the single ops.

    Args:
        device: where the block is.
        d_model, d_inner, d_state, dt_rank: E, D, N, R.
        rotate: whether g is rotated.
    """
    if device.type != "cuda":
        return mixers_step.serves(device)
    sizes = {"d_model": d_model, "d_inner": d_inner, "d_state": d_state, "dt_rank": dt_rank}
    if any(size > _CUDA_MOST[name] for name, size in sizes.items()):
        return False
    if d_model % 16 or d_inner % 16 or d_state % 4 or dt_rank % 4:
        return False
    blocks, power, base = decompose(d_inner)
    if rotate and (blocks > 1 or power < 16 or base not in _CUDA_BASES):
        return False
    return mixers_step.serves(device) and torch.cuda.get_device_capability(device)[0] == 9
