"""What the op tests share: random tensors, and the comparisons."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quamba import ops


class Source:
    """Random tensors from one seed."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def int8(self, *shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, dtype=torch.int8, generator=self.generator)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype)

    def scale(self, *shape: int, around: float = 0.02) -> Tensor:
        return around * (0.5 + torch.rand(shape, generator=self.generator))

    def tensor(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return self.int8(*shape) if dtype is torch.int8 else self.normal(*shape, dtype=dtype)


def clone(args: Sequence[Any]) -> list[Any]:
    """The same arguments with fresh storages, also within lists; strides and offsets are kept."""
    return [clone(a) if isinstance(a, list) else _clone(a) if isinstance(a, Tensor) else a for a in args]


def _clone(value: Tensor) -> Tensor:
    storage = value.untyped_storage().clone()
    return value.new_empty(0).set_(storage, value.storage_offset(), value.shape, value.stride())


def wide(value: Tensor | None) -> np.ndarray | None:
    """float64 NumPy, for the independent definitions; None stays None."""
    return None if value is None else value.to(torch.float64).numpy()


def round_clip(value: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(value), -128, 127)


def assert_close(
    actual: Tensor, expected: Tensor | np.ndarray, *, tolerance: float = 1e-5, share: float = 2e-3
) -> None:
    """Floats within tolerance (relative to the largest value) plus their dtype's rounding; int8 within one step, and
    off by one in no more than `share` of the elements (one is always allowed)."""
    found = actual.to(torch.float64).numpy()
    wanted = wide(expected) if isinstance(expected, Tensor) else expected
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    if found.size == 0:
        return
    difference = np.abs(found - wanted)
    if actual.dtype is torch.int8:
        assert difference.max() <= 1, difference.max()
        assert (difference > 0).sum() <= max(1, share * found.size), (difference > 0).mean()
    else:
        rounding = torch.finfo(actual.dtype).eps * np.abs(wanted)
        excess = difference - rounding - tolerance * max(1.0, float(np.abs(wanted).max()))
        assert excess.max() <= 0, excess.max()


def run_both(op: ops.Op, args: Sequence[Any], *, mutated: int | None = None, tolerance: float = 1e-5) -> Tensor:
    """Run the CPU implementation and the reference on copies; compare the results, dtypes and the mutated argument."""
    first, second = clone(args), clone(args)
    with torch.no_grad():  # the way without the dispatcher; `check_registration` takes the other
        actual = op(*first)
    with ops.reference():
        expected = op(*second)
    assert actual.dtype == expected.dtype
    assert actual.is_contiguous()
    assert_close(actual, expected, tolerance=tolerance)
    if mutated is not None and args[mutated] is not None:
        if args[mutated].dtype is torch.int8:
            assert torch.equal(first[mutated], second[mutated])
        else:
            assert_close(first[mutated], second[mutated], tolerance=tolerance)
    return actual


def check_registration(op: ops.Op, args: Sequence[Any]) -> None:
    """torch.library.opcheck; shapes and dtypes on meta; a compiled function gives what the plain one gives."""
    torch.library.opcheck(op.overload, tuple(clone(args)))
    plain = op(*clone(args))
    meta = op(*pytree.tree_map_only(Tensor, lambda t: t.to("meta"), tuple(args)))
    torch.compiler.reset()
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")(*clone(args))
    outputs = zip(*[out if isinstance(out, tuple) else (out,) for out in (plain, meta, compiled)], strict=True)
    for expected, shaped, traced in outputs:
        assert (shaped.shape, shaped.dtype, shaped.device.type) == (expected.shape, expected.dtype, "meta")
        assert torch.equal(traced, expected)
