"""Block: the arguments that describe a block, given once; the ops that take whole blocks are told their numbers."""

import copy
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quamba.ops.registry import LIBRARY

# Where the arguments of `mixer_step` after hidden, up to residual, are not tensors.
NORM_EPS, DBC_EPS, ROTATE, RESIDUAL = 1, 18, 26, 31
TENSORS, FLOATS, FLAGS = 28, 2, 3
# hidden, and those arguments.
BLOCK_SCHEMA = (
    "Tensor hidden, Tensor norm_weight, float norm_eps, Tensor u_scale, Tensor in_weight, Tensor in_weight_scale,"
    " Tensor? in_bias, Tensor xz_scale, Tensor conv_weight, Tensor conv_weight_scale, Tensor? conv_bias,"
    " Tensor x_scale, Tensor x_weight, Tensor x_weight_scale, Tensor x_in_scale, Tensor x_scan_scale,"
    " Tensor? d_norm_weight, Tensor? B_norm_weight, Tensor? C_norm_weight, float? dbc_eps, Tensor dbc_scale,"
    " Tensor dt_weight, Tensor dt_weight_scale, Tensor? dt_scale, Tensor dt_bias, Tensor A, Tensor D, bool rotate,"
    " Tensor g_scale, Tensor out_weight, Tensor out_weight_scale, Tensor? out_bias, bool residual"
)

LIBRARY.define("keep_block(int number, Tensor?[] tensors, float[] floats, int[] flags) -> ()")  # type: ignore[no-untyped-call]
LIBRARY.define("drop_block(int number) -> ()")  # type: ignore[no-untyped-call]


def packed(blocks: Sequence[Sequence[Any]]) -> tuple[list[Tensor | None], list[float], list[int]]:
    """The blocks' arguments as `mixers_step` takes them.

    Args:
        blocks: for each block the arguments of `mixer_step` from norm_weight to residual.

    Returns:
        Tensors, floats and flags, block after block.
    """
    tensors: list[Tensor | None] = []
    floats: list[float] = []
    flags: list[int] = []
    for block in blocks:
        dbc_eps = block[DBC_EPS]
        tensors += [a for i, a in enumerate(block) if i not in (NORM_EPS, DBC_EPS, ROTATE, RESIDUAL)]
        floats += [block[NORM_EPS], 0.0 if dbc_eps is None else dbc_eps]
        flags += [dbc_eps is not None, block[ROTATE], block[RESIDUAL]]
    return tensors, floats, [int(flag) for flag in flags]


class Block:
    """A block's arguments under a number, as long as this lives. Its tensors may change their values, nothing else.

    An op's thirty tensors take longer on their way through torch's dispatcher than a block's kernels to launch.

    Attributes:
        arguments: those of `mixer_step` from norm_weight to residual.
        number: what the ops that take blocks call it.
    """

    def __init__(self, *arguments: Any) -> None:
        """Keep the arguments, and on a CUDA device have the library of kernels keep them, too.

        Raises:
            RuntimeError: the kernels do not take tensors of these shapes.
        """
        self.arguments = arguments
        self.number = next(_numbers)
        _blocks[self.number] = self
        cuda = all(argument.is_cuda for argument in arguments if isinstance(argument, Tensor))
        if cuda and torch._C._dispatch_has_kernel_for_dispatch_key("quamba::keep_block", "CompositeExplicitAutograd"):
            torch.ops.quamba.keep_block.default(self.number, *packed([arguments]))
            weakref.finalize(self, torch.ops.quamba.drop_block.default, self.number).atexit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Block":
        return Block(*copy.deepcopy(self.arguments, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Block, self.arguments


_numbers = itertools.count(1)
_blocks: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()


def arguments_of(number: int) -> tuple[Any, ...]:
    """The arguments of the block of that number.

    Raises:
        ValueError: there is none.
    """
    block = _blocks.get(number)
    if block is None:
        raise ValueError(f"found no block number {number}; expected the number of a quamba.ops.Block that is alive")
    return block.arguments
