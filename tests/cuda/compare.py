"""Comparing a kernel's result with the reference's."""

from typing import Any

import torch
from torch import Tensor

from quamba.ops import Op

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def randint8(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, device="cuda", dtype=torch.int8)


def scales(*shape: int, mean: float = 0.02) -> Tensor:
    """Positive float32 scales around `mean`, () where no shape is given."""
    return mean * (0.5 + torch.rand(shape, device="cuda"))


def strided(x: Tensor) -> Tensor:
    """The same values, with gaps between rows and columns."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 3, dtype=x.dtype, device=x.device)
    view = wide[..., 1 : 1 + 2 * x.shape[-1] : 2]
    view.copy_(x)
    return view


def sliced(x: Tensor) -> Tensor:
    """The same values, as the second half of wider rows: what a part of a projection's result is."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)
    view = wide[..., x.shape[-1] :]
    view.copy_(x)
    return view


def assert_close(actual: Tensor, expected: Tensor, *, flips: float = 0.0, error: float = 4.0) -> None:
    """int8: within one step, at most the fraction `flips` off. Float: within `error` roundings of the largest value
    in the row and of the value."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert actual.is_contiguous()
    if actual.numel() == 0:
        return
    if actual.dtype == torch.int8:
        off = (actual.int() - expected.int()).abs()
        assert off.max().item() <= 1, f"{(off > 1).sum().item()} of {off.numel()} off by up to {off.max().item()}"
        count = (off > 0).sum().item()
        assert count <= flips * off.numel() + (1 if flips else 0), f"{count} of {off.numel()} off by one"
        return
    eps = EPSILON[actual.dtype]
    a, e = actual.double(), expected.double()
    bound = error * (eps * e.abs() + 2.0**-22 * e.abs().amax()) + 1e-30
    worst = ((a - e).abs() / bound).max().item()
    assert worst <= 1, f"error of {worst:.3g} times the bound"


def check(op: Op, *args: Any, **bounds: float) -> None:
    """Run `op` and its reference on the same arguments (copies, where the op writes) and compare everything."""
    mine = [
        a.clone(memory_format=torch.preserve_format) if isinstance(a, Tensor) and a.is_contiguous() else a for a in args
    ]
    theirs = [
        a.clone(memory_format=torch.preserve_format) if isinstance(a, Tensor) and a.is_contiguous() else a for a in args
    ]
    actual, expected = op(*mine), op.reference(*theirs)
    if isinstance(actual, Tensor):
        actual, expected = (actual,), (expected,)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, **bounds)
    for a, e, before in zip(mine, theirs, args, strict=True):
        if isinstance(before, Tensor) and before.is_contiguous():
            if torch.equal(e, before):
                assert torch.equal(a, before), "an argument was written that the reference leaves alone"
            else:
                assert_close(a, e, **bounds)
