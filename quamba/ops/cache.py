"""Values derived from parameters (packed weights, folded scales), kept as long as the parameters stay as they are."""

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from quamba.ops import native

Value = TypeVar("Value")
# What a value depends on besides its key: tensors, and plain values that can be compared.
Other = Tensor | float | torch.dtype | None


class _Entry(Generic[Value]):
    __slots__ = ("key", "others", "pointer", "pointers", "value", "version", "versions")

    def __init__(self, key: "weakref.ref[Tensor]", tensor: Tensor, others: tuple[Other, ...], value: Value):
        self.key = key
        self.version = tensor._version
        self.pointer = tensor.data_ptr()
        self.others = others
        self.versions = tuple(other._version if isinstance(other, Tensor) else None for other in others)
        self.pointers = tuple(other.data_ptr() if isinstance(other, Tensor) else None for other in others)
        self.value = value

    def fits(self, key: Tensor, others: tuple[Other, ...]) -> bool:
        # Identity first: a tensor that was stored once is known to count its versions.
        if self.key() is not key or self.version != key._version or self.pointer != key.data_ptr():
            return False
        library = native.library()
        if library is not None:
            return library.unchanged(others, self.others, self.pointers, self.versions)  # type: ignore[no-any-return]
        for other, stored, version, pointer in zip(others, self.others, self.versions, self.pointers, strict=True):
            if isinstance(stored, Tensor):
                if other is not stored or stored._version != version or stored.data_ptr() != pointer:
                    return False
            elif isinstance(other, Tensor) or other != stored:
                return False
        return True


class Derived(Generic[Value]):
    """`build(key, *others)`, remembered for the tensor `key` until it or one of the others changes.

    A change is another plain value, another tensor object, another data pointer (`.to()`, `.data =`, swapped tensors)
    or another version (`copy_`, `load_state_dict`, any in-place op); writing through `tensor.data` or NumPy is
    invisible and forbidden.
    Entries go with their key; what `build` returns must not hold the key itself. Inference tensors have no version,
    so a value that depends on one is built anew at every call: create parameters outside `torch.inference_mode`.
    """

    def __init__(self, build: Callable[..., Value]):
        self._build = build
        self._entries: dict[int, _Entry[Value]] = {}

    def __call__(self, key: Tensor, *others: Other) -> Value:
        entry = self._entries.get(id(key))
        if entry is not None and entry.fits(key, others):
            return entry.value
        # Not an inference tensor, even when the first call comes under inference_mode.
        with torch.inference_mode(False), torch.no_grad():
            value = self._build(key, *others)
        if not any(isinstance(other, Tensor) and other.is_inference() for other in (key, *others)):
            self._store(key, others, value)
        return value

    def __len__(self) -> int:
        return len(self._entries)

    def _store(self, key: Tensor, others: tuple[Other, ...], value: Value) -> None:
        number = id(key)

        def forget(gone: "weakref.ref[Tensor]") -> None:
            # The number may belong to a new tensor by now.
            entry = self._entries.get(number)
            if entry is not None and entry.key is gone:
                del self._entries[number]

        self._entries[number] = _Entry(weakref.ref(key, forget), key, others, value)
