"""What a comparison says of latencies."""

import json
from dataclasses import replace

import pytest
import torch

from quamba.bench.load import disturbed
from quamba.bench.timing import Plan
from quamba.errors import SizeError, UnsupportedModelError
from quamba.eval.latency import Latency, LatencySettings, measure_latency, timed_on
from quamba.eval.provenance import hardware
from quamba.ops import native
from tests.runtime.helpers import make
from tests.tiny import make_model

FEW = LatencySettings(prompt=30, batch=2, plan=Plan(rounds=2, runs=3, warm_ups=1))


@pytest.mark.parametrize("recipe", ["float", "quamba-c"])
def test_a_prompt_and_a_step_are_timed(recipe: str) -> None:
    found = measure_latency(make("mamba", recipe), replace(FEW, prompt=600))
    assert (found.prompt, found.batch, found.mode) == (600, 2, "eager")
    assert set(found.times) == {"TTFT", "TPOT"}
    assert {time.runs for time in found.times.values()} == {6}
    assert 0 < found.times["TPOT"].median < found.times["TTFT"].median
    assert found.disturbed == disturbed(found.others, "cpu")
    assert Latency.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_the_sizes_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make("jamba"), set()
    model.register_forward_pre_hook(lambda module, arguments: seen.add(tuple(arguments[0].shape)))
    measure_latency(model, FEW)
    # A hybrid runs through its own forward: the prompt, the prompt before the steps, and a step.
    assert seen == {(2, 30), (2, 4), (2, 1)}


def test_what_has_no_latency_raises() -> None:
    with pytest.raises(UnsupportedModelError, match="simulates its bits"):
        measure_latency(make("mamba", "quamba-w4a4"), FEW)
    with pytest.raises(UnsupportedModelError, match="found a float model"):
        measure_latency(make_model("mamba"), FEW)
    with pytest.raises(SizeError, match="found 1 prompts of 0 tokens"):
        LatencySettings(prompt=0)


def test_another_way_of_computing_is_another_place() -> None:
    device = torch.device("cpu")
    here = timed_on(device)
    assert here == {"hardware": hardware(device), "ops": native.description()}
    with native.disabled():
        assert timed_on(device) != here
