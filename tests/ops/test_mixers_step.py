"""mixers_step: a stack is its blocks one after the other."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quamba import ops
from quamba.ops.block import packed
from quamba.ops.mixers_step import served
from tests.ops.helpers import check_registration, clone
from tests.ops.test_mixer_step import arguments, assert_same_step, stepped

KINDS: list[dict[str, Any]] = [
    {},
    {"norms": "learned", "residual": False},
    {"norms": "weightless", "rotate": False, "channels": True},
    {"float_dt": True, "biases": True, "conv_bias": False, "weight_tensor": True},
]


def stack(kinds: list[dict[str, Any]], **shape: Any) -> tuple[list[Any], list[list[Any]]]:
    """The arguments of a stack, and those of its blocks."""
    blocks = [arguments(**(shape | kind), seed=seed) for seed, kind in enumerate(kinds)]
    lists = packed([tuple(block[1:-3]) for block in blocks])
    args = [blocks[0][0], *lists, blocks[0][-3], [b[-2] for b in blocks], [b[-1] for b in blocks]]
    return args, blocks


def run(args: list[Any]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    fresh = [*args[:-2], [t.clone() for t in args[-2]], [t.clone() for t in args[-1]]]
    return ops.mixers_step(*fresh), fresh[-2], fresh[-1]


@torch.no_grad()
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 5])
def test_equals_its_blocks(batch: int, out_dtype: torch.dtype) -> None:
    args, blocks = stack(KINDS, batch=batch, out_dtype=out_dtype)
    out, conv, ssm = run(args)
    hidden = blocks[0][0]
    for block, one_conv, one_ssm in zip(blocks, conv, ssm, strict=True):
        hidden, wanted_conv, wanted_ssm = stepped([hidden, *block[1:]])
        assert torch.equal(one_conv, wanted_conv)
        assert torch.equal(one_ssm, wanted_ssm)
    assert torch.equal(out, hidden)
    assert out.dtype is out_dtype
    with ops.reference():
        one = run(stack(KINDS[1:2], batch=batch, out_dtype=out_dtype)[0])
    assert_same_step((one[0], one[1][0], one[2][0]), stepped(arguments(**KINDS[1], batch=batch, out_dtype=out_dtype)))


def test_registration() -> None:
    check_registration(ops.mixers_step, stack(KINDS)[0])


@torch.no_grad()
def test_lists_that_are_not_whole_blocks_raise() -> None:
    args, _ = stack(KINDS)
    for index in (1, 2, 3, 5, 6):
        wrong = [value[:-1] if i == index else value for i, value in enumerate(args)]
        with pytest.raises(ValueError, match="mixers_step: found"):
            ops.mixers_step(*wrong)
    with pytest.raises(ValueError, match="at least one"):
        ops.mixers_step(args[0], [], [], [], torch.float32, [], [])


def test_cpus_serve_every_shape() -> None:
    assert served(torch.device("cpu"), d_model=3, d_inner=7, d_state=5, dt_rank=1, rotate=True)


def test_arguments_are_left_alone() -> None:
    args, _ = stack(KINDS)
    before = clone(args[:1]) + [clone([t])[0] if t is not None else None for t in args[1]]
    with torch.no_grad():
        run(args)
    for value, kept in zip([args[0], *args[1]], before, strict=True):
        assert (value is None and kept is None) or torch.equal(value, kept)
