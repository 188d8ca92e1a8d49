"""Timing calls on a device: in turn, warmed up, medians with their spread."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """Milliseconds of a number of runs.

    Attributes:
        median, least, most: of all runs.
        lower, upper: their quartiles.
        runs: how many; 0 where the figures were computed from others.
    """

    median: float
    least: float
    most: float
    lower: float
    upper: float
    runs: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> "Spread":
        """Of at least one run."""
        found = sorted(milliseconds)
        lower, _, upper = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
        return cls(statistics.median(found), found[0], found[-1], lower, upper, len(found))

    @classmethod
    def of_steps(cls, first: "Spread", step: "Spread", steps: int) -> "Spread":
        """What one thing and then so many steps add up to: each of the figures is the sum of theirs; no runs."""
        return cls(
            median=first.median + steps * step.median,
            least=first.least + steps * step.least,
            most=first.most + steps * step.most,
            lower=first.lower + steps * step.lower,
            upper=first.upper + steps * step.upper,
            runs=0,
        )

    def to_dict(self) -> dict[str, float]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """How often to run.

    Attributes:
        rounds: every call has its turn so many times.
        runs: back to back in one turn.
        warm_ups: before the first turn.
        seconds: what a call may take in all of its turns together; a slow one has fewer runs, at least one in a turn.
    """

    rounds: int = 3
    runs: int = 20
    warm_ups: int = 3
    seconds: float = 30.0


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turn(calls: Mapping[str, Callable[[], object]], plan: Plan, device: torch.device) -> dict[str, Spread]:
    """Time calls in turn, so that what changes over time changes all of them.

    On CUDA the time of a call is what lies between two events on the stream, the calls being issued back to back: the
    device's time, or the host's where that is longer. On a CPU it is the clock's.
    """
    runs = {name: _warm_up(call, plan, device) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(plan.rounds):
        for name, call in calls.items():
            synchronize(device)
            found[name] += (_on_cuda if device.type == "cuda" else _on_the_clock)(call, runs[name])
    return {name: Spread.of(times) for name, times in found.items()}


def time_latency(calls: Mapping[str, Callable[[], object]], plan: Plan, device: torch.device) -> dict[str, Spread]:
    """Time calls in turn by the clock, each from an idle device to an idle device."""

    def waited(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            call()
            synchronize(device)

        return run

    waiting = {name: waited(call) for name, call in calls.items()}
    runs = {name: _warm_up(call, plan, device) for name, call in waiting.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(plan.rounds):
        for name, call in waiting.items():
            found[name] += _on_the_clock(call, runs[name])
    return {name: Spread.of(times) for name, times in found.items()}


def _warm_up(call: Callable[[], object], plan: Plan, device: torch.device) -> int:
    """Warm a call up; the runs in a turn that the plan has time for."""
    synchronize(device)
    times: list[float] = []
    while len(times) < plan.warm_ups and sum(times) < plan.seconds / 4:
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    if not times:
        return plan.runs
    return max(1, min(plan.runs, int(plan.seconds / plan.rounds / max(min(times), 1e-9))))


def _on_the_clock(call: Callable[[], object], runs: int) -> list[float]:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _on_cuda(call: Callable[[], object], runs: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy on the device, bytes read and bytes written counted."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    spread = time_in_turn({"copy": lambda: target.copy_(source)}, Plan(rounds=1, runs=10), device)["copy"]
    return 2 * size / (1e-3 * spread.median)
