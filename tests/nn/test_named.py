"""Dotted names: look up, assign, swap."""

import pytest
import torch
from torch import nn

from quamba.nn.named import PassThrough, assign, device_of, lookup, swap


def test_assign_makes_the_holders_and_lookup_finds_the_tensor() -> None:
    module = nn.Module()
    parameter = nn.Parameter(torch.ones(2))
    assign(module, "a.b.weight", parameter)
    assign(module, "a.b.bias", torch.zeros(2))
    assign(module, "scale", torch.ones(()), persistent=False)
    assert lookup(module, "a.b.weight") is parameter
    assert set(module.state_dict()) == {"a.b.weight", "a.b.bias"}
    assert [name for name, _ in module.named_parameters()] == ["a.b.weight"]
    assert lookup(module, "scale").shape == ()


def test_lookup_of_what_is_no_tensor_raises() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False))
    for name in ("0", "0.bias"):
        with pytest.raises(TypeError, match="expected a tensor"):
            lookup(module, name)
    with pytest.raises(AttributeError):
        lookup(module, "1.weight")


def test_swap_replaces_in_place_and_gives_the_old_module_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Tanh()))
    old = model[1][0]
    assert swap(model, "1.0", PassThrough()) is old
    assert isinstance(model[1][0], PassThrough)
    assert [name for name, _ in model[1].named_children()] == ["0", "1"]
    value = torch.randn(3, 2)
    assert model[1][0](value) is value


def test_device_of_parameters_or_buffers() -> None:
    buffered = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2, affine=False))
    for module in (nn.Linear(2, 2), buffered):
        assert device_of(module) == torch.device("cpu")
        assert device_of(module.to("meta")) == torch.device("meta")
