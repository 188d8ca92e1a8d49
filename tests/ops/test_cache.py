"""Derived values: kept while their tensors stay as they are, rebuilt when they change, gone with their key."""

import gc

import pytest
import torch

from quamba.ops.cache import Derived


@pytest.fixture
def counted():
    calls = []

    def build(key, *others):
        calls.append(1)
        return float(key.sum()) + sum(float(other.sum()) for other in others if other is not None)

    return Derived(build), calls


def test_kept_and_rebuilt(counted):
    derived, calls = counted
    key, other = torch.ones(3), torch.ones(2)
    assert derived(key, other, None) == derived(key, other, None) == 5
    assert len(calls) == 1
    for change, expected in (
        (lambda: key.add_(1), 8),
        (lambda: other.mul_(3), 12),
        (lambda: setattr(key, "data", torch.zeros(3)), 6),
        (lambda: setattr(other, "data", torch.zeros(2)), 0),
        (lambda: key[0].fill_(7), 7),
    ):
        change()
        assert derived(key, other, None) == expected
    assert derived(key, None, None) == 7
    assert derived(key, other, torch.ones(1)) == 8
    assert len(derived) == 1


def test_entries_go_with_their_key(counted):
    derived, _ = counted
    key = torch.ones(3)
    derived(key)
    derived(torch.ones(3))
    gc.collect()
    assert len(derived) == 1
    del key
    gc.collect()
    assert len(derived) == 0


def test_inference_tensors_are_never_kept(counted):
    derived, calls = counted
    with torch.inference_mode():
        key = torch.ones(3)
        assert derived(key) == 3
        key.add_(1)
        assert derived(key) == 6
        normal = torch.ones(2).clone()
    assert derived(torch.ones(1), normal) == 3
    assert len(derived) == 0
    assert len(calls) == 3


def test_built_under_inference_mode_serves_outside():
    derived = Derived(lambda key: key * 2)
    key = torch.ones(3)
    with torch.inference_mode():
        value = derived(key)
    assert not value.is_inference()
    assert derived(key) is value
