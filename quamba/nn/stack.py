"""Consecutive quantized mixers in one call: blocks_step for a token each, blocks_prefill for sequences."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quamba import ops
from quamba.errors import SizeError
from quamba.nn.config import MixerState
from quamba.nn.mixer import Mixer
from quamba.nn.quantized_mixer import QuantizedMixer
from quamba.nn.route import as_a_whole


def serves(mixers: Sequence[Mixer | QuantizedMixer], device: torch.device) -> bool:
    """Whether `run` and `prefill` take these mixers, and gain by it.

    Every mixer has to be one that takes its input in one op and adds the residual itself, all of them with the same
    dtypes. On a CPU nothing is gained.
    """
    return (
        device.type == "cuda"
        and all(isinstance(mixer, QuantizedMixer) and mixer.step_arguments is not None for mixer in mixers)
        and all(mixer.config.residual for mixer in mixers)
        and len({(mixer.config.residual_in_fp32, mixer.config.dtype) for mixer in mixers}) == 1
    )


def takes(mixers: Sequence[Mixer | QuantizedMixer], batch: int) -> bool:
    """Whether `run` is for so many sequences on a CUDA device."""
    return all(as_a_whole(mixer.config, batch) for mixer in mixers)


def run(mixers: Sequence[QuantizedMixer], hidden: Tensor, states: Sequence[MixerState]) -> Tensor:
    """One token per sequence through all mixers.

    Args:
        mixers: consecutive blocks.
        hidden: (B, E) any float dtype; on CUDA, B as `takes` says.
        states: of B sequences, one per mixer; updated in place.

    Returns:
        (B, E), float32 where the residual stream is, else of hidden's dtype.

    Raises:
        SizeError: a mixer does not take a token in one op.
    """
    out: Tensor = ops.blocks_step(hidden, _numbers(mixers), _out_dtype(mixers, hidden), *_tensors(states))
    return out


def prefill(
    mixers: Sequence[QuantizedMixer], hidden: Tensor, mask: Tensor | None, states: Sequence[MixerState]
) -> Tensor:
    """Sequences through all mixers.

    Args:
        mixers: consecutive blocks.
        hidden: (B, L, E) any float dtype.
        mask: (B, L), 0 at padding, or None.
        states: of B sequences, one per mixer; updated in place.

    Returns:
        (B, L, E), float32 where the residual stream is, else of hidden's dtype.

    Raises:
        SizeError: a mixer does not take a sequence in one op.
    """
    numbers, wide = _numbers(mixers), mixers[0].wide_dtype(hidden)
    out: Tensor = ops.blocks_prefill(hidden, numbers, wide, _out_dtype(mixers, hidden), mask, *_tensors(states))
    return out


def _numbers(mixers: Sequence[QuantizedMixer]) -> list[int]:
    blocks = [mixer.block.number for mixer in mixers if mixer.step_arguments is not None and mixer.block is not None]
    if len(blocks) != len(mixers):
        raise SizeError(
            f"found {len(mixers) - len(blocks)} of {len(mixers)} mixers that do not take their input in one op; "
            "expected none (quamba.nn.stack.serves)"
        )
    return blocks


def _out_dtype(mixers: Sequence[QuantizedMixer], hidden: Tensor) -> torch.dtype:
    return torch.float32 if mixers[0].config.residual_in_fp32 else hidden.dtype


def _tensors(states: Sequence[MixerState]) -> tuple[list[Tensor], list[Tensor]]:
    return [state.conv for state in states], [state.ssm for state in states]
