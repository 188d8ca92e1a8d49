"""Blocks: kept under their numbers as long as they live, and no longer."""

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from quamba import ops
from quamba.ops.block import BLOCK_SCHEMA, FLAGS, FLOATS, TENSORS, arguments_of, packed
from tests.ops.test_mixer_step import NAMES, arguments

BLOCK = slice(1, NAMES.index("out_dtype"))


def same(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, Tensor) else bool(first == second)


def test_a_block_is_found_by_its_number_while_it_lives() -> None:
    args = arguments(norms="learned")[BLOCK]
    block, other = ops.Block(*args), ops.Block(*arguments(seed=1)[BLOCK])
    assert block.number != other.number
    assert all(a is b for a, b in zip(arguments_of(block.number), args, strict=True))
    number = block.number
    del block
    gc.collect()
    with pytest.raises(ValueError, match=f"found no block number {number}; expected"):
        arguments_of(number)
    assert arguments_of(other.number) is other.arguments


def test_packed_has_every_argument_once() -> None:
    args = arguments(norms="weightless", rotate=False, residual=True)[BLOCK]
    tensors, floats, flags = packed([args, args])
    assert [len(tensors), len(floats), len(flags)] == [2 * TENSORS, 2 * FLOATS, 2 * FLAGS]
    assert len(args) == BLOCK_SCHEMA.count(",") == TENSORS + FLOATS + FLAGS - 1
    expected = [a for name, a in zip(NAMES[BLOCK], args, strict=True) if "Tensor" in schema_type(name)]
    assert all(a is b for a, b in zip(tensors, expected * 2, strict=True))
    assert floats == [0.3, 0.07] * 2
    assert flags == [1, 0, 1] * 2


def schema_type(name: str) -> str:
    return next(part for part in BLOCK_SCHEMA.split(",") if part.endswith(f" {name}"))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_a_copy_has_tensors_and_a_number_of_its_own(copied: Any) -> None:
    block = ops.Block(*arguments()[BLOCK])
    other = copied(block)
    assert other.number != block.number
    assert arguments_of(other.number) is other.arguments
    for before, after in zip(block.arguments, other.arguments, strict=True):
        assert same(before, after)
        assert before is not after or not isinstance(before, Tensor)
