"""The native CPU library, quamba/_cpu (csrc/cpu): whether it is there, why not, and how its arguments are packed.

The ops use it where it serves and compute the same with torch where it does not. QUAMBA_NATIVE=0 in the
environment, or `with disabled():`, turns it off.
"""

import contextlib
import importlib
import os
import struct
from collections.abc import Iterator
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
        return None, f"not built, or not for this Python: {error}; a C++ compiler and a reinstallation of quamba build it"


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


class Packer:
    """Packs named values into the bytes of one of the library's structs, whose members it asks the library for."""

    def __init__(self, members: tuple[tuple[str, str], ...]) -> None:
        """`members`: (name, kind) of each, as the library's MIXER_STEP and others list them."""
        self._members = members
        self._struct = struct.Struct("@" + "".join(_FORMATS[kind] for _, kind in members))

    def __call__(self, **values: Tensor | float | None) -> bytes:
        """All members by name: a tensor or None for a pointer or a scale (() or one per element), else a number.

        The tensors have to outlive the bytes' use.
        """
        if len(values) != len(self._members):
            raise TypeError(f"found {len(values)} values; expected {[name for name, _ in self._members]}")
        flat: list[int | float] = []
        for name, kind in self._members:
            value = values[name]
            if kind == "R":
                flat.append(float(value))  # type: ignore[arg-type]
            elif kind == "I":
                flat.append(int(value))  # type: ignore[arg-type]
            else:
                assert value is None or isinstance(value, Tensor)
                flat.append(0 if value is None else value.data_ptr())
                if kind == "S":
                    flat.append(0 if value is None or value.dim() == 0 else 1)
        return self._struct.pack(*flat)
