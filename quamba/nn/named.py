"""Dotted names inside a module tree: look a tensor up, put one there, swap a submodule."""

from itertools import chain

import torch
from torch import Tensor, nn


class Part(nn.Module):
    """A holder of tensors, so that a block's names read like "in_proj.weight"."""


def lookup(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer with that dotted name."""
    path, _, leaf = name.rpartition(".")
    tensor = getattr(module.get_submodule(path), leaf)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"found {type(tensor).__name__} at {name!r}; expected a tensor")
    return tensor


def assign(module: nn.Module, name: str, tensor: Tensor, *, persistent: bool = True) -> None:
    """Put a parameter or a buffer under a dotted name, making the holders on the way."""
    path, _, leaf = name.rpartition(".")
    for part in path.split(".") if path else ():
        if part not in module._modules:
            module.add_module(part, Part())
        module = module.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor, persistent=persistent)


def swap(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Replace the submodule with that dotted name; returns the one that was there."""
    path, _, leaf = name.rpartition(".")
    parent = root.get_submodule(path)
    old = parent.get_submodule(leaf)
    parent._modules[leaf] = module
    return old


class PassThrough(nn.Module):
    """Stands where a module was whose work another one does now; returns its input."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(...) -> the same."""
        return hidden


def device_of(module: nn.Module) -> torch.device:
    """Where a module's tensors are: the first of its parameters, or of its buffers."""
    return next(chain(module.parameters(), module.buffers())).device
