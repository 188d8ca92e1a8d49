"""Which graphs are captured, kept and dropped, with a stand-in for those of torch (tests/cuda has real ones)."""

import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from quamba.runtime.graphs import Graphs


class Recorder:
    """A CUDAGraph that cannot replay: it counts."""

    made: list["Recorder"]

    def __init__(self) -> None:
        self.replays = 0
        self.capturing = False
        Recorder.made.append(self)

    def capture_begin(self, *, pool: Any, capture_error_mode: str) -> None:
        assert (pool, capture_error_mode) == ("a pool", "thread_local")
        self.capturing = True

    def capture_end(self) -> None:
        self.capturing = False

    def replay(self) -> None:
        self.replays += 1


class Stream:
    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    Recorder.made = []
    for name, value in (
        ("CUDAGraph", Recorder),
        ("Stream", Stream),
        ("current_stream", Stream),
        ("stream", nullcontext),
        ("synchronize", lambda device: None),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    return Graphs(torch.device("cpu"), 2, "a pool")


def test_a_graph_is_captured_once_and_reads_its_own_inputs(graphs: Graphs) -> None:
    seen: list[tuple[str, bool, Tensor]] = []

    def work(name: str) -> Any:
        def body(tensor: Tensor) -> Tensor:
            seen.append((name, Recorder.made[-1].capturing, tensor))
            return tensor.view(-1)

        return body

    given = torch.arange(3)
    for step in range(3):
        out = graphs.run("key", [given + step], body=work("body"), warm_up=work("warm up"))
        # What a replay would write lies where the captured body's result lay.
        assert torch.equal(out, given + step)
    assert [entry[:2] for entry in seen] == [("warm up", False), ("body", True)]
    assert seen[0][2] is seen[1][2]
    assert [graph.replays for graph in Recorder.made] == [3]


def test_the_least_recently_used_goes(graphs: Graphs) -> None:
    for key in ("a", "b", "a", "c", "a", "b"):
        graphs.run(key, [torch.zeros(1)], body=torch.clone, warm_up=torch.clone)
    assert graphs.keys == ["a", "b"]
    assert "c" not in graphs
    assert [graph.replays for graph in Recorder.made] == [3, 1, 1, 1]


def test_inputs_that_come_at_the_same_place_are_read_there(graphs: Graphs) -> None:
    graphs.places = 2
    read: list[int] = []

    def body(tensor: Tensor) -> Tensor:
        read.append(tensor.data_ptr())
        return tensor.new_zeros(())

    def run(tensor: Tensor) -> None:
        graphs.run("key", [tensor], body=body, warm_up=torch.clone)

    held = torch.arange(8 * 20).view(8, 20)
    for _ in range(7):
        run(held[0])
    assert len(Recorder.made) == 1
    assert read[0] != held.data_ptr()
    run(held[0])
    assert read[1:] == [held.data_ptr()]
    # Others of the same shape have their values copied, whatever there is by now.
    for row in held[1:]:
        run(row)
    run(held.T[0, :8].as_strided((20,), (8,)))
    assert [graph.replays for graph in Recorder.made] == [15, 1]
    for _ in range(20):
        run(held[1])
        run(held[2])
    # There are two such places; the third one's inputs are copied.
    assert read[1:] == [held.data_ptr(), held[1].data_ptr()]
    assert [graph.replays for graph in Recorder.made] == [15 + 6 + 20, 1, 14]


def test_what_is_read_in_place_is_not_kept(graphs: Graphs) -> None:
    graphs.places = 1
    given = torch.zeros(3)
    for _ in range(10):
        graphs.run("key", [given], body=lambda tensor: tensor.clone(), warm_up=torch.clone)
    assert len(Recorder.made) == 2
    alive = weakref.ref(given)
    del given
    assert alive() is None


def test_a_body_that_cannot_be_captured_is_not_kept(graphs: Graphs) -> None:
    def fail(tensor: Tensor) -> Tensor:
        raise ValueError("not here")

    with pytest.raises(ValueError, match="not here"):
        graphs.run("key", [torch.zeros(1)], body=fail, warm_up=torch.clone)
    assert "key" not in graphs
    assert not Recorder.made[-1].capturing
    graphs.run("key", [torch.zeros(1)], body=torch.clone, warm_up=torch.clone)
