"""The native CPU library, quamba/_cpu (csrc/cpu): whether it is there, why not, and how its arguments are packed.

The ops use it where it serves and compute the same with torch where it does not. QUAMBA_NATIVE=0 in the
environment, or `with disabled():`, turns it off.
"""

import contextlib
import importlib
import os
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from torch import Tensor

_FORMATS = {"P": "P", "S": "Pq", "I": "q", "R": "d"}


def _load() -> tuple[Any, str]:
    """(the library or None, why not)."""
    if os.environ.get("QUAMBA_NATIVE", "1") == "0":
        return None, "QUAMBA_NATIVE=0"
    try:
        return importlib.import_module("quamba._cpu"), ""
    except ImportError as error:
        return (
            None,
            f"not built, or not for this Python: {error}; a C++ compiler and a reinstallation of quamba build it",
        )


_library, _reason = _load()


def library() -> Any:
    """The extension module, or None where it is missing or turned off."""
    return _library


def available() -> bool:
    """Whether the CPU ops run native code."""
    return _library is not None


def description() -> str:
    """One line: the instruction set in use, or why torch serves instead."""
    return f"native ({_library.isa()})" if _library is not None else f"torch ({_reason})"


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Inside this context the CPU ops compute with torch, in every thread."""
    global _library, _reason
    before = _library, _reason
    _library, _reason = None, "turned off by quamba.ops.native.disabled()"
    try:
        yield
    finally:
        _library, _reason = before


@lru_cache
def _layout(op: str) -> tuple[tuple[tuple[str, str], ...], struct.Struct]:
    members = _library.MEMBERS[op]
    return members, struct.Struct("@" + "".join(_FORMATS[kind] for _, kind in members))


def pack(op: str, **values: Tensor | float | None) -> bytes:
    """An op's arguments as the bytes of its struct in the library, which says their names and order.

    Args:
        op: its name.
        values: all members by name: a tensor or None for a pointer or a scale (() or one per element), else a
            number. The tensors have to outlive the use of the bytes.
    """
    members, layout = _layout(op)
    if len(values) != len(members):
        raise TypeError(f"{op}: found {sorted(values)}; expected {sorted(name for name, _ in members)}")
    flat: list[int | float] = []
    for name, kind in members:
        value = values[name]
        if isinstance(value, Tensor):
            flat.append(value.data_ptr())
            if kind == "S":
                flat.append(0 if value.dim() == 0 else 1)
        else:
            flat.append(0 if value is None else value)
            if kind == "S":
                flat.append(0)
    return layout.pack(*flat)


def run(op: str, **values: Tensor | float | None) -> None:
    """Run an op of the library; arguments as for `pack`."""
    getattr(_library, op)(pack(op, **values))


def float32(tensor: Tensor | None) -> Tensor | None:
    """The tensor as the library reads vectors: float32 and contiguous; itself where it is."""
    return None if tensor is None else tensor.float().contiguous()


def scale(tensor: Tensor | None) -> Tensor | None:
    """A scale as the library reads it: contiguous."""
    return None if tensor is None else tensor.contiguous()
