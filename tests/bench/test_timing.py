"""Spreads, and calls timed in turn."""

import time

import pytest
import torch

from quamba.bench.timing import Plan, Spread, copy_bandwidth, time_in_turn, time_latency

CPU = torch.device("cpu")


def test_spread() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 1.0, 5.0, 2.0, 4.0, 5)
    assert Spread.of([2.5]) == Spread(2.5, 2.5, 2.5, 2.5, 2.5, 1)


def test_a_spread_of_steps() -> None:
    first, step = Spread(10.0, 8.0, 14.0, 9.0, 12.0, 5), Spread(2.0, 1.0, 4.0, 1.5, 3.0, 7)
    assert Spread.of_steps(first, step, 3) == Spread(16.0, 11.0, 26.0, 13.5, 21.0, 0)


@pytest.mark.parametrize("time_calls", [time_in_turn, time_latency])
def test_slow_calls_have_fewer_runs(time_calls: object) -> None:
    seen: list[str] = []

    def call(name: str, seconds: float) -> None:
        seen.append(name)
        time.sleep(seconds)

    calls = {"slow": lambda: call("slow", 0.05), "fast": lambda: call("fast", 0.0)}
    found = time_calls(calls, Plan(rounds=2, runs=6, warm_ups=4, seconds=0.3), CPU)  # type: ignore[operator]
    # Warmed up for a quarter of the time, then at most three runs of 50 ms in each of two turns.
    assert seen[:2] == ["slow", "slow"]
    assert seen.count("fast") == 4 + 2 * 6
    assert found["fast"].runs == 12
    assert 2 <= found["slow"].runs <= 4
    assert seen.count("slow") == 2 + found["slow"].runs


@pytest.mark.parametrize("time_calls", [time_in_turn, time_latency])
def test_calls_have_their_turns(time_calls: object) -> None:
    seen: list[str] = []

    def slow() -> None:
        seen.append("slow")
        time.sleep(0.003)

    def fast() -> None:
        seen.append("fast")

    found = time_calls({"slow": slow, "fast": fast}, Plan(rounds=2, runs=3, warm_ups=1), CPU)  # type: ignore[operator]
    assert seen == ["slow", "fast", *(["slow"] * 3 + ["fast"] * 3) * 2]
    assert found["slow"].runs == found["fast"].runs == 6
    assert found["slow"].median > 3 > found["fast"].median


def test_copy_bandwidth_counts_both_ways() -> None:
    source, target = torch.ones(2**26, dtype=torch.int8), torch.empty(2**26, dtype=torch.int8)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    # Loosely, since others use the machine: a factor of two between both is what could go wrong in the definition.
    assert 0.2 < copy_bandwidth(CPU) / (2 * 2**26 / min(times)) < 1.6
