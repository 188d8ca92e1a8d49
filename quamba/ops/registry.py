"""How an op is put together: one schema, one fake, one plain reference, one CPU implementation.

Each op module calls `register` once. The callable that comes back is the op: it runs the kernel that is
registered for the tensors' device, or, inside `with quamba.ops.reference():`, the plain reference.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

LIBRARY = torch.library.Library("quamba", "DEF")  # type: ignore[no-untyped-call]
_FORCE_REFERENCE: contextvars.ContextVar[bool] = contextvars.ContextVar("quamba_force_reference", default=False)
_reference_depth = 0


@dataclass(frozen=True)
class Op:
    """An op and the functions behind it; call it like a function."""

    name: str
    schema: str
    reference: Callable[..., Any]
    cpu: Callable[..., Any]
    overload: Any
    has_cuda: bool = False  # a CUDA implementation in Python, apart from the library of kernels

    def __call__(self, *args: Any) -> Any:
        if _reference_depth and _FORCE_REFERENCE.get():
            return self.reference(*args)
        if _needs_no_dispatch(args[0]):
            return self.cpu(*args)
        return self.overload(*args)

    def serves(self, device: torch.device) -> bool:
        """Whether a kernel is registered for this kind of device."""
        key = device.type.upper()
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"quamba::{self.name}", key)


def _needs_no_dispatch(first: Any) -> bool:
    """Whether the dispatcher would do nothing but call the CPU implementation: a plain CPU tensor, eager, no grad.

    Boxing the arguments for a kernel written in Python takes 2 to 4 microseconds, a tenth of a decode step.
    """
    return (
        not torch.compiler.is_compiling()
        and type(first) is torch.Tensor
        and first.is_cpu
        and not torch.is_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


OPS: dict[str, Op] = {}


def register(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
) -> Op:
    """Define quamba::<name> and return it as a callable.

    Args:
        name: the op's one word through all layers.
        schema: its arguments and results, "(Tensor x, ...) -> Tensor".
        reference: the plain PyTorch meaning of the op, on any device.
        fake: shapes and dtypes only.
        cpu: the fast CPU implementation.
        cuda: a CUDA implementation in Python, for ops that the library of kernels does not have; None for the others.
    """
    LIBRARY.define(f"{name}{schema}")  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, cpu, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"quamba::{name}", fake, lib=LIBRARY)
    if cuda is not None:
        LIBRARY.impl(name, cuda, "CUDA")  # type: ignore[no-untyped-call]
    OPS[name] = Op(name, schema, reference, cpu, getattr(torch.ops.quamba, name).default, cuda is not None)
    return OPS[name]


def watched() -> bool:
    """Whether something follows the ops one by one: a trace, a dispatch mode, a transform, the references."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or references_forced()
    )


def float64_in(reference: Callable[..., Any], cpu: Callable[..., Any]) -> Callable[..., Any]:
    """A CPU implementation that leaves a float64 first argument, which only exactness checks use, to the reference."""

    def implementation(*args: Any) -> Any:
        return (reference if args[0].dtype is torch.float64 else cpu)(*args)

    return implementation


def references_forced() -> bool:
    """True inside `with quamba.ops.reference():`."""
    return bool(_reference_depth) and _FORCE_REFERENCE.get()


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """Inside this context every quamba op runs its plain PyTorch reference, on any device."""
    global _reference_depth
    token = _FORCE_REFERENCE.set(True)
    _reference_depth += 1
    try:
        yield
    finally:
        _reference_depth -= 1
        _FORCE_REFERENCE.reset(token)
