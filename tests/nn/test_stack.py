"""A stack of mixers in one call against the mixers one by one."""

from typing import Any

import pytest
import torch

from quamba.errors import SizeError
from quamba.nn import stack
from quamba.recipes import RECIPES
from tests.tiny import hidden_states, make_mixer, quantize_mixer

CUDA = torch.device("cuda")


def mixers(recipe: str = "quamba-c", count: int = 3, **changes: Any) -> list[Any]:
    format = RECIPES[recipe].block(0)
    hidden = hidden_states(2, 16, 24)
    return [quantize_mixer(make_mixer(seed=seed, **changes), format, hidden) for seed in range(count)]


@torch.no_grad()
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("recipe", ["quamba-c", "naive"])
def test_a_stack_is_its_mixers(recipe: str, wide: bool) -> None:
    blocks = mixers(recipe, dtype=torch.bfloat16, residual_in_fp32=wide)
    hidden = hidden_states(3, 1, 24, dtype=torch.bfloat16, seed=4)
    states, own = ([block.new_state(3, torch.device("cpu")) for block in blocks] for _ in range(2))
    for _ in range(3):
        expected = hidden
        for block, state in zip(blocks, own, strict=True):
            expected = block(expected, state=state)
        found = stack.run(blocks, hidden[:, 0], states)
        assert found.dtype == (torch.float32 if wide else torch.bfloat16)
        assert torch.equal(found[:, None], expected)
    for a, b in zip(states, own, strict=True):
        assert torch.equal(a.conv, b.conv)
        assert torch.equal(a.ssm, b.ssm)


def test_which_stacks_it_serves() -> None:
    blocks = mixers()
    assert stack.serves(blocks, CUDA)
    assert not stack.serves(blocks, torch.device("cpu"))
    assert not stack.serves([*blocks, *mixers("dynamic", 1)], CUDA)
    assert not stack.serves([*blocks, make_mixer()], CUDA)
    assert not stack.serves([*blocks, *mixers(count=1, residual_in_fp32=False)], CUDA)
    assert not stack.serves(mixers(residual=False), CUDA)


def test_a_mixer_without_the_one_op_raises() -> None:
    blocks = [*mixers(), *mixers("dynamic", 1)]
    states = [block.new_state(1, torch.device("cpu")) for block in blocks]
    with pytest.raises(SizeError, match="found 1 of 4 mixers"):
        stack.run(blocks, hidden_states(1, 24), states)
