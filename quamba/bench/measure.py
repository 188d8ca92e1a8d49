"""The measurements of `quamba bench`: every subject in turn, in one run."""

import gc
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from typing import Any

import torch

from quamba.bench.kernels import KernelTime, kernel_times
from quamba.bench.load import Others, disturbed
from quamba.bench.subjects import Call, Subject
from quamba.bench.timing import Plan, Spread, copy_bandwidth, synchronize, time_in_turn, time_latency
from quamba.eval.provenance import hardware, now

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
        time: milliseconds; of no runs where it was computed from a TTFT and a TPOT.
        peak_bytes: of device memory beyond the subject's weights during the case, graphs and states counted; None
            on a CPU, and where nothing ran.
        bandwidth: bytes per second of weights and state, over the median; None where that is no measure.
        operations: of the blocks' linears per second, over the median; None where that is no measure.
        speedup: median of the reference in the same case and mode over this one's, both measured; None for the
            reference itself and without one.
    """

    subject: str
    case: Case
    time: Spread
    peak_bytes: int | None
    bandwidth: float | None
    operations: float | None
    speedup: float | None = None

    @property
    def measured(self) -> bool:
        """False where the time was computed."""
        return self.time.runs > 0


@dataclass(frozen=True)
class Memory:
    """What one subject takes, in bytes: its weights in memory and in a checkpoint, the state of one sequence."""

    weights: int
    checkpoint: int
    state: int


@dataclass(frozen=True)
class Report:
    """Everything that `quamba bench` found; `to_dict` has all of it.

    Attributes:
        model, dtype, device: what was timed, in which dtype its float part, and where.
        modes: each subject's fastest mode, the one that TTLT runs in.
        reference: the subject that speedups are over; None without one.
        date: of the end, in UTC.
        others: the share of the CPU's cores that other processes kept busy meanwhile; None where unknown.
        disturbed: True for times that are not to be published, of a CPU that others used.
        copy_bandwidth: bytes per second, read and written.
    """

    model: str
    dtype: str
    device: str
    modes: Mapping[str, str]
    reference: str | None
    date: str
    versions: Mapping[str, str]
    plan: Plan
    others: float | None
    disturbed: bool
    copy_bandwidth: float
    memory: Mapping[str, Memory]
    figures: tuple[Figure, ...]
    kernels: Mapping[str, list[KernelTime]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; times in milliseconds, the rest in bytes, operations and seconds."""
        content = asdict(self)
        for found, figure in zip(content["figures"], self.figures, strict=True):
            found["measured"] = figure.measured
        return content


def measure(
    *,
    model: str,
    dtype: torch.dtype,
    subjects: Sequence[Subject],
    reference: str | None = None,
    batches: Sequence[int],
    lengths: Sequence[int],
    new_tokens: Sequence[int],
    plan: Plan,
    kernels: int,
) -> Report:
    """Time prefill (TTFT, one prompt), decode steps (TPOT) and both together (TTLT, one prompt).

    A TTLT that would take longer than plan.seconds in the fewest runs is computed: TTFT + (new tokens - 1) TPOT.

    Args:
        model: named in the report.
        dtype: of what is float.
        subjects: all on one device.
        reference: the name of the one that the others' speedups are over.
        batches: of the decode steps.
        lengths: of the prompts.
        new_tokens: of TTLT, each with every length; with any of them the steps of one sequence are timed too.
        plan: how often to run.
        kernels: how many kernels to name; 0 leaves the breakdown out.
    """
    device = subjects[0].device
    modes = [mode for mode in ("graph", "eager") if any(mode in subject.modes for subject in subjects)]
    if new_tokens and 1 not in batches:
        batches = [1, *batches]
    cases = [Case(TTFT, mode, 1, length) for length in lengths for mode in modes]
    cases += [Case(TPOT, mode, batch) for batch in batches for mode in modes]
    others = Others()
    figures: list[Figure] = []
    breakdown: dict[str, list[KernelTime]] = {}
    for case in cases:
        able = [subject for subject in subjects if case.mode in subject.modes]
        figures += _compared(_figures({subject: case for subject in able}, plan), reference)
        for subject in able:
            if kernels and case.mode == subject.modes[0]:
                call = _call(subject, case)
                call()
                breakdown[f"{subject.name}, {describe(case)}"] = kernel_times(call, device, most=kernels)
                _forget(device)
    for length in lengths:
        for count in new_tokens:
            own = {subject: Case(TTLT, subject.modes[0], 1, length, count) for subject in subjects}
            figures += _compared(_whole(own, figures, plan), reference)
    share = others.share()
    return Report(
        model=model,
        dtype=str(dtype).removeprefix("torch."),
        device=hardware(device),
        modes={subject.name: subject.modes[0] for subject in subjects},
        reference=reference,
        date=now(),
        versions=_versions(),
        plan=plan,
        others=share,
        disturbed=disturbed(share, device.type),
        copy_bandwidth=copy_bandwidth(device),
        memory={s.name: Memory(s.weight_bytes, s.checkpoint_bytes, s.state_bytes(1)) for s in subjects},
        figures=tuple(figures),
        kernels=breakdown,
    )


def describe(case: Case) -> str:
    """A case in words."""
    prompt = f", prompt {case.length}" if case.length else ""
    new = f", {case.new_tokens} new tokens" if case.new_tokens else ""
    return f"{case.what} {case.mode}, batch {case.batch}{prompt}{new}"


def _figures(cases: Mapping[Subject, Case], plan: Plan) -> list[Figure]:
    """Each subject in its case, in turn."""
    if not cases:
        return []
    device = next(iter(cases)).device
    calls: dict[str, Callable[[], object]] = {}
    peaks: dict[str, int | None] = {}
    for subject, case in cases.items():
        before = _reset_peak(device)
        calls[subject.name] = call = _call(subject, case)
        call()
        peaks[subject.name] = None if before is None else _peak(device) - before
    if all(case.what == TTLT for case in cases.values()):
        times = time_latency(calls, plan, device)
    else:
        times = time_in_turn(calls, plan, device)
    calls.clear()
    _forget(device)
    return [_figure(subject, case, times[subject.name], peaks[subject.name]) for subject, case in cases.items()]


def _whole(cases: Mapping[Subject, Case], found: Sequence[Figure], plan: Plan) -> list[Figure]:
    """TTLT: measured, or computed where the fewest runs would take too long."""
    # Long, and made of many runs: one to warm up, and one more in `_figures`.
    plan = replace(plan, runs=max(1, plan.runs // 10), warm_ups=1)
    parts = {(figure.subject, figure.case): figure.time for figure in found}
    computed: dict[Subject, Spread] = {}
    for subject, case in cases.items():
        first = parts[subject.name, Case(TTFT, case.mode, 1, case.length)]
        step = parts[subject.name, Case(TPOT, case.mode, 1)]
        computed[subject] = Spread.of_steps(first, step, case.new_tokens - 1)
    limit = 1e3 * plan.seconds / (plan.rounds + 2)
    measured = _figures({s: case for s, case in cases.items() if computed[s].median <= limit}, plan)
    by_name = {figure.subject: figure for figure in measured}
    return [by_name.get(s.name) or _figure(s, case, computed[s], None) for s, case in cases.items()]


def _figure(subject: Subject, case: Case, time: Spread, peak: int | None) -> Figure:
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
    )


def _compared(figures: Sequence[Figure], reference: str | None) -> list[Figure]:
    """With speedups over the reference's, which is among them or in no such case; of measured times alone."""
    base = next((figure.time.median for figure in figures if figure.subject == reference and figure.measured), None)
    return [
        figure
        if base is None or figure.subject == reference or not figure.measured
        else replace(figure, speedup=base / figure.time.median)
        for figure in figures
    ]


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
