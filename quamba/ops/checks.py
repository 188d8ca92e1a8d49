"""Shapes and dtypes of an op's arguments: wrong ones raise, saying what was found and what was expected.

Each check costs one or two hundred nanoseconds when it passes, so that decode steps can afford them.
"""

import torch
from torch import Tensor

from quamba.errors import DtypeError, SizeError

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
INT8_OR_FLOAT = FLOATS | {torch.int8}
_FLOAT32 = frozenset((torch.float32,))
_INT8 = frozenset((torch.int8,))


def dtype(op: str, name: str, tensor: Tensor, expected: frozenset[torch.dtype]) -> None:
    """Raise DtypeError unless the tensor's dtype is one of `expected`."""
    if tensor.dtype not in expected:
        words = " or ".join(sorted(str(choice).removeprefix("torch.") for choice in expected))
        raise DtypeError(f"{op}: found {name} of dtype {tensor.dtype}; expected {words}")


def int8(op: str, name: str, tensor: Tensor) -> None:
    """Raise DtypeError unless the tensor is int8."""
    if tensor.dtype is not torch.int8:
        dtype(op, name, tensor, _INT8)


def float32(op: str, name: str, tensor: Tensor) -> None:
    """Raise DtypeError unless the tensor is float32."""
    if tensor.dtype is not torch.float32:
        dtype(op, name, tensor, _FLOAT32)


def same_dtype(op: str, name: str, tensor: Tensor, other: Tensor) -> None:
    """Raise DtypeError unless the tensor has the other's dtype."""
    if tensor.dtype is not other.dtype:
        dtype(op, name, tensor, frozenset((other.dtype,)))


def shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise SizeError unless the tensor has exactly this shape."""
    if tensor.shape != expected:
        raise SizeError(f"{op}: found {name} of shape {tuple(tensor.shape)}; expected {tuple(expected)}")


def dims(op: str, name: str, tensor: Tensor, expected: int) -> None:
    """Raise SizeError unless the tensor has this number of dimensions."""
    if tensor.dim() != expected:
        raise SizeError(f"{op}: found {name} of shape {tuple(tensor.shape)}; expected {expected} dimensions")


def scale(op: str, name: str, tensor: Tensor | None, size: int) -> None:
    """Raise unless the scale is None, or float32 of shape () or (size,)."""
    if tensor is None:
        return
    float32(op, name, tensor)
    if tensor.dim() != 0 and tensor.shape != (size,):
        raise SizeError(f"{op}: found {name} of shape {tuple(tensor.shape)}; expected () or ({size},)")


def vector(op: str, name: str, tensor: Tensor | None, size: int) -> None:
    """Raise unless the tensor is None, or floating point of shape (size,)."""
    if tensor is not None:
        dtype(op, name, tensor, FLOATS)
        shape(op, name, tensor, (size,))


def output(op: str, out_scale: Tensor | None, out_dtype: torch.dtype) -> None:
    """Raise DtypeError unless out_dtype is int8 where there is an out_scale, and floating point where there is none."""
    if (out_dtype is torch.int8) != (out_scale is not None) or out_dtype not in INT8_OR_FLOAT:
        found = "no out_scale" if out_scale is None else "an out_scale"
        raise DtypeError(
            f"{op}: found out_dtype {out_dtype} with {found}; expected torch.int8 with one, a float dtype without"
        )
