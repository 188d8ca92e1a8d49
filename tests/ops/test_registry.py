"""The registry: `reference()` forces the reference, everywhere inside and nowhere else."""

import threading

import pytest
import torch

from quamba import ops
from quamba.ops.registry import Op


@pytest.fixture
def probe() -> Op:
    """An op whose reference says 1 and whose kernel says 2."""

    def kernel(*args):
        return torch.tensor(2)

    return Op("probe", "()", lambda *args: torch.tensor(1), kernel)


def test_reference_forces_the_reference(probe):
    assert probe() == 2
    with ops.reference():
        assert probe() == 1
        with ops.reference():
            assert probe() == 1
        assert probe() == 1
    assert probe() == 2


def test_reference_ends_with_an_error(probe):
    with pytest.raises(KeyError), ops.reference():
        raise KeyError("inside")
    assert probe() == 2


def test_reference_holds_in_its_own_thread_only(probe):
    results = []
    with ops.reference():
        thread = threading.Thread(target=lambda: results.append(int(probe())))
        thread.start()
        thread.join()
        assert probe() == 1
    assert results == [2]


def test_every_op_takes_its_reference(monkeypatch):
    for name, op in ops.OPS.items():
        seen = []
        forced = Op(name, op.schema, lambda *args, seen=seen: seen.append(args), op.overload)
        with ops.reference():
            forced(1, 2)
        assert seen == [(1, 2)], name


def test_every_op_is_exported():
    assert set(ops.OPS) <= set(ops.__all__)
    for name, op in ops.OPS.items():
        assert getattr(ops, name) is op
        assert getattr(torch.ops.quamba, name).default is op.overload
