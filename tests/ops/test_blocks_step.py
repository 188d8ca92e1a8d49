"""blocks_step: mixers_step with the blocks' numbers in place of their tensors."""

from typing import Any

import pytest
import torch

from quamba import ops
from tests.ops.helpers import check_registration
from tests.ops.test_block import BLOCK
from tests.ops.test_mixers_step import KINDS, run, stack


def kept(kinds: list[dict[str, Any]], **shape: Any) -> tuple[list[Any], list[ops.Block], list[Any]]:
    """The arguments, the blocks, and the arguments of mixers_step."""
    args, steps = stack(kinds, **shape)
    blocks = [ops.Block(*step[BLOCK]) for step in steps]
    return [args[0], [block.number for block in blocks], *args[4:]], blocks, args


@torch.no_grad()
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reference", [False, True])
def test_equals_mixers_step(out_dtype: torch.dtype, reference: bool) -> None:
    args, _, lists = kept(KINDS, batch=3, out_dtype=out_dtype)
    expected, conv, ssm = run(lists)
    if reference:
        with ops.reference():
            expected, conv, ssm = run(lists)
            out = ops.blocks_step(*args)
    else:
        out = ops.blocks_step(*args)
    assert out.dtype is out_dtype
    assert torch.equal(out, expected)
    for found, wanted in zip((*args[-2], *args[-1]), (*conv, *ssm), strict=True):
        assert torch.equal(found, wanted)


def test_registration() -> None:
    args, blocks, _ = kept(KINDS)
    check_registration(ops.blocks_step, args)
    assert len(blocks) == len(KINDS)


@torch.no_grad()
def test_a_number_without_a_block_raises() -> None:
    args, blocks, _ = kept(KINDS)
    args[1] = [*args[1][:-1], max(args[1]) + 1000]
    with pytest.raises(ValueError, match="found no block number"):
        ops.blocks_step(*args)
    with pytest.raises(ValueError, match="mixers_step: found"):
        ops.blocks_step(args[0], [blocks[0].number], *args[2:])
