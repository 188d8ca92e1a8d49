"""The measurements of `quamba bench`: every subject in turn, in one run."""

import gc
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import torch

from quamba.bench.kernels import KernelTime, kernel_times
from quamba.bench.subjects import Call, Subject
from quamba.bench.timing import Plan, Spread, copy_bandwidth, synchronize, time_in_turn, time_latency

# The columns of a figure: what was run.
TTFT, TPOT, TTLT = "TTFT", "TPOT", "TTLT"
_PACKAGES = ("quamba", "torch", "transformers", "triton", "mamba-ssm", "causal-conv1d")


@dataclass(frozen=True)
class Case:
    """What was run: TTFT (a prompt's prefill), TPOT (a decode step) or TTLT (a prompt and new tokens)."""

    what: str
    mode: str
    batch: int
    length: int = 0
    new_tokens: int = 0


@dataclass(frozen=True)
class Figure:
    """One subject in one case.

    Attributes:
        subject, case: whose, and of what.
        time: milliseconds.
        peak_bytes: of device memory beyond the subject's weights during the case, graphs and states counted; None
            on a CPU.
        bandwidth: bytes per second of weights and state, over the median; None where that is no measure.
        operations: of the blocks' linears per second, over the median; None where that is no measure.
        speedup: median of the first other subject in the same case and mode over this one's; None without one.
    """

    subject: str
    case: Case
    time: Spread
    peak_bytes: int | None
    bandwidth: float | None
    operations: float | None
    speedup: float | None = None


@dataclass(frozen=True)
class Report:
    """Everything that `quamba bench` found; `to_dict` has all of it."""

    model: str
    recipe: str | None
    dtype: str
    device: str
    date: str
    versions: Mapping[str, str]
    plan: Plan
    copy_bandwidth: float
    weight_bytes: Mapping[str, int]
    figures: tuple[Figure, ...]
    kernels: Mapping[str, list[KernelTime]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; times in milliseconds, the rest in bytes, operations and seconds."""
        return asdict(self)


def measure(
    *,
    model: str,
    recipe: str | None,
    dtype: torch.dtype,
    subjects: Sequence[Subject],
    batches: Sequence[int],
    lengths: Sequence[int],
    new_tokens: int,
    plan: Plan,
    kernels: int,
) -> Report:
    """Time prefill (TTFT, one prompt), decode steps (TPOT) and both together (TTLT, one prompt).

    Args:
        model, recipe: named in the report.
        dtype: of what is float.
        subjects: ours first, then its peers.
        batches: of the decode steps.
        lengths: of the prompts.
        new_tokens: of TTLT; 0 leaves it out.
        plan: how often to run.
        kernels: how many kernels to name; 0 leaves the breakdown out.
    """
    ours = subjects[0]
    cases = [Case(TTFT, mode, 1, length) for length in lengths for mode in ours.modes]
    cases += [Case(TPOT, mode, batch) for batch in batches for mode in ours.modes]
    if new_tokens:
        cases += [Case(TTLT, ours.modes[0], 1, length, new_tokens) for length in lengths]
    figures: list[Figure] = []
    breakdown: dict[str, list[KernelTime]] = {}
    for case in cases:
        figures += _figures(case, [s for s in subjects if case.mode in s.modes], plan)
        if kernels and case.what != TTLT and case.mode == ours.modes[0]:
            for subject in subjects:
                title = f"{subject.name}, {describe(case)}"
                call = _call(subject, case)
                call()
                breakdown[title] = kernel_times(call, ours.device, most=kernels)
                _forget(ours.device)
    return Report(
        model=model,
        recipe=recipe,
        dtype=str(dtype).removeprefix("torch."),
        device=_device_name(ours.device),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=_versions(),
        plan=plan,
        copy_bandwidth=copy_bandwidth(ours.device),
        weight_bytes={subject.name: subject.weight_bytes for subject in subjects},
        figures=tuple(figures),
        kernels=breakdown,
    )


def describe(case: Case) -> str:
    """A case in words."""
    prompt = f", prompt {case.length}" if case.length else ""
    new = f", {case.new_tokens} new tokens" if case.new_tokens else ""
    return f"{case.what} {case.mode}, batch {case.batch}{prompt}{new}"


def _figures(case: Case, subjects: Sequence[Subject], plan: Plan) -> list[Figure]:
    device = subjects[0].device
    calls: dict[str, Callable[[], object]] = {}
    peaks: dict[str, int | None] = {}
    for subject in subjects:
        before = _reset_peak(device)
        calls[subject.name] = call = _call(subject, case)
        call()
        peaks[subject.name] = None if before is None else _peak(device) - before
    if case.what == TTLT:
        # Long, and made of many runs.
        times = time_latency(calls, Plan(plan.rounds, max(1, plan.runs // 10), 1), device)
    else:
        times = time_in_turn(calls, plan, device)
    calls.clear()
    _forget(device)
    return [_figure(case, subject, subjects, times, peaks[subject.name]) for subject in subjects]


def _figure(
    case: Case, subject: Subject, subjects: Sequence[Subject], times: Mapping[str, Spread], peak: int | None
) -> Figure:
    time = times[subject.name]
    others = [times[other.name].median for other in subjects if other is not subject]
    bandwidth = operations = None
    if case.what == TPOT and subject.step_weight_bytes is not None:
        # The state is read and written.
        moved = subject.step_weight_bytes + 2 * subject.state_bytes(case.batch)
        bandwidth = moved / (1e-3 * time.median)
    if case.what == TTFT and subject.token_operations is not None:
        operations = subject.token_operations * case.batch * case.length / (1e-3 * time.median)
    return Figure(
        subject=subject.name,
        case=case,
        time=time,
        peak_bytes=peak,
        bandwidth=bandwidth,
        operations=operations,
        speedup=others[0] / time.median if others else None,
    )


def _call(subject: Subject, case: Case) -> Call:
    if case.what == TTFT:
        return subject.prefill(case.batch, case.length, case.mode)
    if case.what == TPOT:
        return subject.decode(case.batch, case.mode)
    return subject.whole(case.batch, case.length, case.new_tokens)


def _reset_peak(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _forget(device: torch.device) -> None:
    """Give the memory of dropped states and graphs back before the next case."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    from quamba import __version__
    from quamba.ops import cuda, native

    found["quamba"] = __version__
    found["ops"] = f"{native.description()}; CUDA: {cuda.MISSING or 'compiled kernels'}"
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found
