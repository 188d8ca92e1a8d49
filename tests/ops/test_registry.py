"""The registry: `reference()` forces the reference, everywhere inside and nowhere else."""

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from quamba import ops
from quamba.ops.registry import Op


@pytest.fixture
def probe() -> Op:
    """An op whose reference says 1 and whose kernel says 2."""

    def kernel(*args):
        return torch.tensor(2)

    return Op("probe", "(Tensor x)", lambda *args: torch.tensor(1), kernel, kernel)


def test_reference_forces_the_reference(probe):
    assert probe(torch.ones(1)) == 2
    with ops.reference():
        assert probe(torch.ones(1)) == 1
        with ops.reference():
            assert probe(torch.ones(1)) == 1
        assert probe(torch.ones(1)) == 1
    assert probe(torch.ones(1)) == 2


def test_reference_ends_with_an_error(probe):
    with pytest.raises(KeyError), ops.reference():
        raise KeyError("inside")
    assert probe(torch.ones(1)) == 2


def test_reference_holds_in_its_own_thread_only(probe):
    results = []
    with ops.reference():
        thread = threading.Thread(target=lambda: results.append(int(probe(torch.ones(1)))))
        thread.start()
        thread.join()
        assert probe(torch.ones(1)) == 1
    assert results == [2]


def test_every_op_takes_its_reference(monkeypatch):
    for name, op in ops.OPS.items():
        seen = []
        forced = Op(name, op.schema, lambda *args, seen=seen: seen.append(args), op.cpu, op.overload)
        with ops.reference():
            forced(1, 2)
        assert seen == [(1, 2)], name


def test_every_op_is_exported():
    assert set(ops.OPS) <= set(ops.__all__)
    for name, op in ops.OPS.items():
        assert getattr(ops, name) is op
        assert getattr(torch.ops.quamba, name).default is op.overload


@pytest.fixture
def routes() -> Op:
    """An op that says which way it went."""
    return Op("probe", "(Tensor x)", lambda *args: "reference", lambda *args: "direct", lambda *args: "dispatched")


def test_the_dispatcher_is_left_out_only_where_it_would_do_nothing(routes):
    x = torch.ones(2)
    assert routes(x) == "dispatched"  # grad mode: autograd has a word
    with torch.no_grad():
        assert routes(x) == "direct"
        assert routes(x.to("meta")) == "dispatched"
        assert routes(torch.nn.Parameter(x)) == "dispatched"
        with ops.reference():
            assert routes(x) == "reference"
        with FakeTensorMode() as mode:
            assert routes(x) == "dispatched"
            fake = mode.from_tensor(x)
        assert routes(fake) == "dispatched"
        taken = []
        torch.vmap(lambda row: (taken.append(routes(row)), row)[1])(torch.ones(2, 3))
        make_fx(lambda row: (taken.append(routes(row)), row + 1)[1])(x)
        assert set(taken) == {"dispatched"}
    with torch.inference_mode():
        assert routes(x) == "direct"


def test_a_compiled_function_holds_the_op():
    graphs = []

    def backend(module, inputs):
        graphs.append(str(module.graph))
        return module

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(lambda x: ops.quantize(x, torch.tensor(0.1)), backend=backend, fullgraph=True)(torch.ones(2))
    assert "torch.ops.quamba.quantize" in graphs[0]
