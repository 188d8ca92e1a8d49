"""What the engine captures and when, with calls in place of CUDA graphs."""

from typing import Any

import pytest
import torch

from quamba import ops
from quamba.runtime import RuntimeConfig
from quamba.runtime.engine import Engine
from tests.runtime.helpers import make, with_calls_for_graphs
from tests.tiny import token_ids


def engines(slots: int = 4, **settings: Any) -> tuple[Engine, Engine]:
    """One with graphs, one without, of the same model."""
    model = make("mamba-biased")
    config = RuntimeConfig(**{"prefill_lengths": (8, 12), "prefill_tokens": 24, **settings})
    return with_calls_for_graphs(Engine(model, slots, config)), Engine(model, slots, config)


def same_states(a: Engine, b: Engine) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.states.tensors, b.states.tensors, strict=True))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 12])
def test_prefill_graphs_change_no_bit(length: int) -> None:
    graphs, eager = engines(prefill_uses=1)
    for seed in (1, 2):
        ids = token_ids(2, length, seed=seed)
        assert torch.equal(graphs.prefill(ids, None), eager.prefill(ids, None))
        assert same_states(graphs, eager)
    assert graphs.captured() == [("prefill", 2, 8 if length <= 8 else 12)]
    assert graphs.ran == {"prefill graph": 2}
    assert eager.ran == {"prefill eager": 2}


def test_masks_reach_the_graph() -> None:
    graphs, eager = engines(prefill_uses=1)
    ids, mask = token_ids(2, 6), (torch.arange(6) >= torch.tensor([[0], [3]])).long()
    expected = eager.prefill(ids, mask)
    assert torch.equal(graphs.prefill(ids, mask), expected)
    assert torch.equal(graphs.prefill(ids, mask.bool()), expected)
    assert not torch.equal(graphs.prefill(ids, None), expected)


def test_which_prompts_get_a_graph() -> None:
    graphs, _ = engines(prefill_uses=2)
    for ids, name in (
        (token_ids(2, 5), "prefill eager"),  # the first use of its padded shape
        (token_ids(2, 7), "prefill graph"),
        (token_ids(3, 9), "prefill eager"),  # 36 tokens with padding
        (token_ids(1, 13), "prefill eager"),  # longer than any
        (token_ids(1, 5), "prefill eager"),  # another batch
    ):
        before = graphs.ran[name]
        graphs.prefill(ids, None)
        assert graphs.ran[name] == before + 1
    with ops.reference():
        graphs.prefill(token_ids(2, 5), None)
        graphs.decode(token_ids(2))
    assert graphs.ran == {"prefill eager": 5, "prefill graph": 1, "decode eager": 1}


def test_decode_graphs_change_no_bit() -> None:
    graphs, eager = engines()
    ids = token_ids(4, 5)
    assert torch.equal(graphs.prefill(ids, None), eager.prefill(ids, None))
    for step, batch in enumerate((4, 4, 2, 1, 2, 4)):
        tokens = token_ids(batch, seed=step)
        assert torch.equal(graphs.decode(tokens.to(torch.int32)), eager.decode(tokens))
        assert same_states(graphs, eager)
    assert graphs.captured()[:3] == [("decode", 4), ("decode", 2), ("decode", 1)]


def test_warming_up_leaves_the_states_alone() -> None:
    graphs, eager = engines()
    graphs.prefill(token_ids(2, 3), None)
    before = [tensor.clone() for tensor in graphs.states.tensors]
    graphs.program.step(token_ids(2), graphs._scratch(2))
    assert all(torch.equal(a, b) for a, b in zip(before, graphs.states.tensors, strict=True))
    assert len({id(state) for state in graphs._scratch(2)}) == 1
    del eager


def test_admit_changes_one_slot() -> None:
    graphs, eager = engines(prefill_uses=1)
    ids = token_ids(4, 5)
    for engine in (graphs, eager):
        engine.prefill(ids, None)
    others = [tensor.clone() for tensor in eager.states.tensors]
    prompt = token_ids(1, 7, seed=3)
    assert torch.equal(graphs.admit(2, prompt, None), eager.admit(2, prompt, None))
    assert same_states(graphs, eager)
    for tensor, old in zip(graphs.states.tensors, others, strict=True):
        assert torch.equal(tensor[[0, 1, 3]], old[[0, 1, 3]])
        assert not torch.equal(tensor[2], old[2])
    alone = Engine(make("mamba-biased"), 1, RuntimeConfig())
    alone.prefill(prompt, None)
    for tensor, expected in zip(graphs.states.tensors, alone.states.tensors, strict=True):
        assert torch.equal(tensor[2:3], expected)
