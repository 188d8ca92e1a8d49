"""Times single CUDA ops against their floor: `python benchmarks/ops_cuda.py [--only REGEX] [--json FILE]`.

Each case is captured in a CUDA graph that walks over enough copies of its inputs to leave the L2 cache, and replayed;
the figure is the median over the replays, per call. The floor is the larger of bytes (each input read once, each
output written once) over the copy bandwidth measured in the same run, and operations over the unit's rate.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from quamba import ops

RATES = {"int8": 1300e12, "exp": 132 * 16 * 1.755e9}  # matrix: the best published kernels; exp: one a lane of the unit
CACHE_BYTES = 128 << 20


@dataclass
class Case:
    name: str
    shape: str
    inputs: Callable[[], tuple]
    op: Callable
    work: float = 0.0
    unit: str = ""


@dataclass
class Row:
    name: str
    shape: str
    microseconds: float
    spread: float
    floor: float
    rate: str


def size_of(values) -> int:
    values = values if isinstance(values, tuple) else (values,)
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def time_graph(op: Callable, sets: list[tuple], *, replays: int = 20, calls: int = 24) -> tuple[float, float]:
    """Median and spread (half the distance of the quartiles) in microseconds per call.

    A graph makes so many calls at least, for its launch and the events take microseconds, too.
    """
    for inputs in sets[:2]:
        op(*inputs)
    torch.cuda.synchronize()
    passes = -(-calls // len(sets))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets * passes:
            op(*inputs)
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (len(sets) * passes))
    quartiles = statistics.quantiles(times, n=4)
    return statistics.median(times), (quartiles[2] - quartiles[0]) / 2


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large device-to-device copy."""
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    microseconds, _ = time_graph(lambda a, b: b.copy_(a), [(source, target)], replays=10, calls=1)
    return 2 * source.numel() / microseconds * 1e6


def int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")


def half(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float16)


def scale(*shape: int) -> Tensor:
    return torch.rand(shape, device="cuda") * 0.02 + 0.01


def linear_case(m: int, n: int, k: int, *, out: torch.dtype, residual: bool = False) -> Case:
    def inputs() -> tuple:
        quantized = out == torch.int8
        return (
            int8(m, k),
            scale(),
            int8(n, k),
            scale(n),
            None,
            half(m, n) if residual else None,
            scale(n) * 300 if quantized else None,
            out,
        )

    name = "linear" + (" + residual" if residual else "")
    return Case(name, f"{m}x{n}x{k} {str(out)[6:]}", inputs, ops.linear, 2.0 * m * n * k, "int8")


def scan_case(batch: int, length: int, channels: int, *, out: torch.dtype, rank: int = 0) -> Case:
    """rank: B and C are the last columns of a result that has so many before them, as W_x gives it."""

    def inputs() -> tuple:
        wide, dbc = (batch, length, channels), int8(batch, length, rank + 32)
        B, C = (dbc[..., rank : rank + 16], dbc[..., rank + 16 :]) if rank else (int8(batch, length, 16) for _ in "BC")
        return (
            *(int8(*wide), scale(channels), int8(*wide), scale(channels), torch.randn(channels, device="cuda") - 4),
            -torch.rand(channels, 16, device="cuda") * 16,
            *(B, scale(), C, scale(), torch.randn(channels, device="cuda")),
            *(int8(*wide), scale(channels), scale() if out == torch.int8 else None, out),
            torch.zeros(batch, channels, 16, device="cuda"),
        )

    work = batch * length * channels * 16.0
    shape = f"({batch},{length},{channels}) {str(out)[6:]}" + (", columns" if rank else "")
    return Case("selective_scan", shape, inputs, ops.selective_scan, work, "exp")


def scan_step_case(batch: int, channels: int) -> Case:
    def inputs() -> tuple:
        return (
            *(int8(batch, channels), scale(channels), int8(batch, channels), scale(channels)),
            *(torch.randn(channels, device="cuda") - 4, -torch.rand(channels, 16, device="cuda") * 16),
            *(int8(batch, 16), scale(), int8(batch, 16), scale(), torch.randn(channels, device="cuda")),
            *(int8(batch, channels), scale(channels), None, torch.float16),
            torch.zeros(batch, channels, 16, device="cuda"),
        )

    return Case("selective_scan_step", f"({batch},{channels})", inputs, ops.selective_scan_step)


def scan_dt_step_case(batch: int, channels: int, rank: int) -> Case:
    def inputs() -> tuple:
        return (
            *(int8(batch, channels), scale(channels), int8(batch, rank), scale()),
            *(int8(channels, rank), scale(channels) * 1e-2, scale(channels)),
            *(torch.randn(channels, device="cuda") - 4, -torch.rand(channels, 16, device="cuda") * 16),
            *(int8(batch, 16), scale(), int8(batch, 16), scale(), torch.randn(channels, device="cuda")),
            *(int8(batch, channels), scale(channels), None, torch.float16),
            torch.zeros(batch, channels, 16, device="cuda"),
        )

    return Case("selective_scan_dt_step", f"({batch},{channels},{rank})", inputs, ops.selective_scan_dt_step)


def conv_case(batch: int, length: int, channels: int) -> Case:
    def inputs() -> tuple:
        x = int8(batch, length, 2 * channels)[..., :channels]
        args = (x, scale(channels), int8(channels, 4), scale(channels), half(channels), scale(channels), torch.int8)
        return (*args, None, int8(batch, channels, 4))

    return Case("causal_conv1d", f"({batch},{length},{channels})", inputs, ops.causal_conv1d)


def conv_step_case(batch: int, channels: int) -> Case:
    def inputs() -> tuple:
        args = (int8(batch, channels), scale(channels), int8(channels, 4), scale(channels), half(channels))
        return (*args, scale(channels), torch.int8, int8(batch, channels, 4))

    return Case("causal_conv1d_step", f"({batch},{channels})", inputs, ops.causal_conv1d_step)


def row_cases(rows: int, columns: int) -> list[Case]:
    shape = f"({rows},{columns}) float16"
    return [
        Case("quantize", shape, lambda: (half(rows, columns), scale(columns)), ops.quantize),
        Case("quantize_per_token", shape, lambda: (half(rows, columns),), ops.quantize_per_token),
        Case("hadamard_quant", shape, lambda: (half(rows, columns), scale(columns)), ops.hadamard_quant),
        Case("hadamard_quant", f"{shape}, one scale", lambda: (half(rows, columns), scale()), ops.hadamard_quant),
    ]


def norm_case(rows: int, columns: int) -> Case:
    inputs = lambda: (half(rows, columns), half(columns), scale(), 1e-5)  # noqa: E731
    return Case("rms_norm_quant", f"({rows},{columns}) float16", inputs, ops.rms_norm_quant)


def cases() -> list[Case]:
    i8, f16 = torch.int8, torch.float16
    result = [
        linear_case(2048, 10240, 2560, out=i8),
        linear_case(2048, 10240, 2560, out=f16),
        linear_case(2048, 2560, 5120, out=f16, residual=True),
        linear_case(2048, 192, 5120, out=i8),
        linear_case(2048, 5120, 160, out=i8),
        linear_case(2048, 3072, 768, out=i8),
        linear_case(2048, 768, 1536, out=f16, residual=True),
        linear_case(8192, 10240, 2560, out=i8),
        *(linear_case(m, 10240, 2560, out=i8) for m in (1, 2, 4, 8, 16, 32, 64, 128)),
        *(linear_case(m, 2560, 5120, out=f16, residual=True) for m in (1, 8, 16, 64)),
        *(linear_case(m, 192, 5120, out=i8) for m in (1, 16, 64)),
        *(linear_case(m, 5120, 160, out=i8) for m in (1, 16, 64)),
        *(linear_case(m, 50280, 2560, out=f16) for m in (1, 64)),
        linear_case(1, 3072, 768, out=i8),
        linear_case(1, 768, 1536, out=f16, residual=True),
        *(scan_case(1, 2048, channels, out=f16) for channels in (5120, 4096, 3072, 2048, 1536)),
        *(scan_case(1, 2048, channels, out=f16, rank=rank) for channels, rank in ((5120, 160), (1536, 48))),
        scan_case(1, 2048, 5120, out=i8),
        *(scan_case(1, 512, channels, out=f16) for channels in (5120, 1536)),
        scan_case(4, 2048, 5120, out=f16),
        *(scan_step_case(batch, 5120) for batch in (1, 16, 64, 256)),
        *(scan_dt_step_case(batch, 5120, 160) for batch in (1, 9, 16, 32, 64, 256)),
        *(scan_dt_step_case(batch, 1536, 48) for batch in (16, 64)),
        conv_case(1, 2048, 5120),
        *(conv_step_case(batch, 5120) for batch in (1, 64)),
        *(norm_case(rows, 2560) for rows in (2048, 1, 64)),
    ]
    for rows in (2048, 1, 64):
        result += row_cases(rows, 5120)
    return [*result, *row_cases(2048, 1536)[2:], *row_cases(2048, 8192)[2:]]


def measure(case: Case, bandwidth: float) -> Row:
    first = case.inputs()
    moved = size_of(first) + size_of(case.op(*first))
    sets = [first]
    while len(sets) < 2 or (len(sets) * moved < CACHE_BYTES and len(sets) < 50):
        sets.append(case.inputs())
    microseconds, spread = time_graph(case.op, sets)
    floor = max(moved / bandwidth, case.work / RATES[case.unit] if case.unit else 0.0) * 1e6
    rate = f"{moved / microseconds * 1e-6:.2f} TB/s"
    if case.unit == "int8":
        rate += f", {case.work / microseconds * 1e-6:.0f} TOP/s"
    return Row(case.name, case.shape, microseconds, spread, floor, rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name and shape this expression finds")
    parser.add_argument("--json", help="write the rows there, too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    rows = []
    for case in cases():
        if re.search(arguments.only, f"{case.name} {case.shape}"):
            row = measure(case, bandwidth)
            rows.append(asdict(row))
            print(
                f"{row.name:22s} {row.shape:28s} {row.microseconds:8.2f} us (+-{row.spread:.2f})"
                f"  floor {row.floor:7.2f}  {row.rate}",
                flush=True,
            )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"bandwidth": bandwidth, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
