"""Which kernels a call spends its time in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class KernelTime:
    """One kernel (on a CPU: one op) in one call: how often it ran, and its milliseconds in all."""

    name: str
    count: float
    milliseconds: float


def kernel_times(call: Callable[[], object], device: torch.device, *, most: int, calls: int = 3) -> list[KernelTime]:
    """The kernels of a call by their time, the longest first, then "others" and "all" together.

    Args:
        call: what to look at; warmed up.
        device: where it runs.
        most: how many kernels to name.
        calls: how many times to run it; figures are per call.
    """
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(calls):
            call()
        if on_cuda:
            torch.cuda.synchronize(device)
    found = []
    for event in profiler.key_averages():
        entry: Any = event
        microseconds = entry.self_device_time_total if on_cuda else entry.self_cpu_time_total
        if microseconds > 0:
            found.append(KernelTime(entry.key, entry.count / calls, 1e-3 * microseconds / calls))
    found.sort(key=lambda kernel: -kernel.milliseconds)
    rest = found[most:]
    if rest:
        rest = [KernelTime("others", sum(k.count for k in rest), sum(k.milliseconds for k in rest))]
    total = KernelTime("all", sum(k.count for k in found), sum(k.milliseconds for k in found))
    return [*found[:most], *rest, total]
