"""Slots of recurrent states."""

import pytest
import torch

from quamba.errors import DtypeError, SizeError
from quamba.models import find_adapter, quantized_layers
from quamba.runtime.states import States
from tests.runtime.helpers import make


def states(slots: int = 3, recipe: str = "quamba-c", fill: bool = True) -> States:
    model = make("mamba", recipe)
    made = States(dict(quantized_layers(find_adapter(model), model)), slots, torch.device("cpu"))
    if fill:
        for number, tensor in enumerate(made.tensors):
            tensor.copy_((torch.arange(tensor.numel()) + number).view(tensor.shape) % 113)
    return made


def test_first_slots_are_views_and_stay_the_same() -> None:
    made = states()
    first = made.first(2)
    assert first is made.first(2)
    assert [tuple(s.conv.shape) for s in first] == [(2, 48, 4)] * 3
    assert all(a.conv.data_ptr() == b.conv.data_ptr() for a, b in zip(first, made.by_layer.values(), strict=True))
    assert made.bytes == 3 * 3 * 48 * (4 + 4 * 5)


def test_zero_clears_the_first_slots_alone() -> None:
    made, before = states(), states()
    made.zero(2)
    for tensor, old in zip(made.tensors, before.tensors, strict=True):
        assert not tensor[:2].any()
        assert torch.equal(tensor[2], old[2])
    made.zero()
    assert not any(tensor.any() for tensor in made.tensors)


def test_export_and_load() -> None:
    made, other = states(), states(slots=4, fill=False)
    exported = made.export([2, 0])
    assert exported["layers.1.ssm"].shape == (2, 48, 5)
    other.load(exported, [1, 3])
    for tensor, old in zip(other.tensors, made.tensors, strict=True):
        assert torch.equal(tensor[[1, 3]], old[[2, 0]])
        assert not tensor[[0, 2]].any()
    # Copies: what happens later does not reach them.
    made.zero()
    assert exported["layers.1.ssm"].any()


def test_copy_slot() -> None:
    made, one = states(), states(slots=1)
    made.copy_slot(2, one)
    for tensor, source, old in zip(made.tensors, one.tensors, states().tensors, strict=True):
        assert torch.equal(tensor[2], source[0])
        assert torch.equal(tensor[:2], old[:2])


def test_states_of_another_model_raise() -> None:
    made = states()
    exported = made.export([0])
    with pytest.raises(SizeError, match=r"found layers.0.conv of shape \(1, 48, 4\); expected \(2, 48, 4\)"):
        made.load(exported, [0, 1])
    with pytest.raises(
        SizeError, match=r"without nothing and with \['layers.3.conv'\]; expected exactly the model's 6"
    ):
        made.load(exported | {"layers.3.conv": exported["layers.0.conv"]}, [0])
    with pytest.raises(DtypeError, match=r"found layers.0.conv of dtype torch.float32; expected torch.int8"):
        made.load(states(recipe="float").export([0]), [0])
    assert torch.equal(made.tensors[0], states().tensors[0])
