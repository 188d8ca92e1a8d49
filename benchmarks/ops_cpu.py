"""Time the ops on the CPU: prefill shapes, and one layer of single-token decode op by op.

    python benchmarks/ops_cpu.py [--threads 2] [--layers 8] [--model-width 256]

Prints the smallest of several means: microseconds of wall time, and of processor time, which other
processes disturb less. Decode goes through `--layers` sets of weights in turn, as a model does.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from quamba import ops


def measure(function: Callable[[], object], *, repeats: int = 7, seconds: float = 0.05) -> tuple[float, float]:
    """(wall, processor) seconds per call, each the least of `repeats` means over about `seconds`."""
    function()
    begin = time.perf_counter()
    function()
    calls = max(1, int(seconds / max(1e-7, time.perf_counter() - begin)))
    wall, processor = [], []
    for _ in range(repeats):
        begin, begin_processor = time.perf_counter(), time.process_time()
        for _ in range(calls):
            function()
        wall.append((time.perf_counter() - begin) / calls)
        processor.append((time.process_time() - begin_processor) / calls)
    return min(wall), min(processor)


def report(name: str, function: Callable[[], object], *, per: int = 1) -> float:
    wall, processor = measure(function)
    print(f"{name:44s} {1e6 * wall / per:10.1f} {1e6 * processor / per:10.1f}")
    return processor / per


def int8(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


class Layer:
    """The tensors of one quantized Mamba layer with random contents, and its decode step as eight ops."""

    def __init__(self, width: int, batch: int, state_size: int = 16, taps: int = 4) -> None:
        inner, rank = 2 * width, -(-width // 16)
        self.split = [rank, state_size, state_size]
        self.scale = {name: torch.tensor(0.02) for name in ["u", "x0", "x", "d", "B", "C", "dt", "z", "g"]}
        self.norm = torch.rand(width)
        self.linears = {
            name: (int8(n, k), torch.rand(n) * 1e-3)
            for name, n, k in (
                ("in", 2 * inner, width),
                ("x", rank + 2 * state_size, inner),
                ("dt", inner, rank),
                ("out", width, inner),
            )
        }
        self.xz_scale = torch.full((2 * inner,), 0.02)
        self.dbc_scale = torch.full((rank + 2 * state_size,), 0.02)
        self.conv = (int8(inner, taps), torch.rand(inner) * 1e-3, torch.rand(inner))
        self.conv_state = int8(batch, inner, taps)
        self.A = -torch.arange(1.0, state_size + 1).expand(inner, state_size).contiguous()
        self.dt_bias, self.D = torch.randn(inner) - 3, torch.ones(inner)
        self.state = torch.zeros(batch, inner, state_size)

    def linear(
        self, name: str, x: Tensor, x_scale: str, out_scale: Tensor | None, residual: Tensor | None = None
    ) -> Tensor:
        weight, weight_scale = self.linears[name]
        dtype = torch.float32 if out_scale is None else torch.int8
        return ops.linear(x, self.scale[x_scale], weight, weight_scale, None, residual, out_scale, dtype)

    def step(self, name: str, v: dict[str, Tensor]) -> None:
        """Run one of the ops on the values so far."""
        s = self.scale
        if name == "rms_norm_quant":
            v["u"] = ops.rms_norm_quant(v["h"], self.norm, s["u"], 1e-5)
        elif name == "linear in_proj":
            v["x0"], v["z"] = self.linear("in", v["u"], "u", self.xz_scale).chunk(2, dim=-1)
        elif name == "causal_conv1d_step":
            weight, weight_scale, bias = self.conv
            v["x"] = ops.causal_conv1d_step(
                v["x0"], s["x0"], weight, weight_scale, bias, s["x"], torch.int8, self.conv_state
            )
        elif name == "linear x_proj":
            v["d"], v["B"], v["C"] = self.linear("x", v["x"], "x", self.dbc_scale).split(self.split, dim=-1)
        elif name == "linear dt_proj":
            v["dt"] = self.linear("dt", v["d"], "d", s["dt"])
        elif name == "selective_scan_step":
            v["g"] = ops.selective_scan_step(
                *(v["x"], s["x"], v["dt"], s["dt"], self.dt_bias, self.A, v["B"], s["B"], v["C"], s["C"]),
                *(self.D, v["z"], s["z"], None, torch.float32, self.state),
            )
        elif name == "hadamard_quant":
            v["gq"] = ops.hadamard_quant(v["g"], s["g"])
        elif name == "linear out_proj":
            v["out"] = self.linear("out", v["gq"], "g", None, v["h"])


STEPS = (
    "rms_norm_quant",
    "linear in_proj",
    "causal_conv1d_step",
    "linear x_proj",
    "linear dt_proj",
    "selective_scan_step",
    "hadamard_quant",
    "linear out_proj",
)


def decode(width: int, batch: int, count: int) -> None:
    layers = [Layer(width, batch) for _ in range(count)]
    values = {"h": torch.randn(batch, width)}
    for name in STEPS:
        layers[0].step(name, values)
    for name in STEPS:

        def each(name: str = name) -> None:
            for layer in layers:
                layer.step(name, values)

        report(f"{name}, batch {batch}", each, per=count)

    def whole() -> None:
        for layer in layers:
            for name in STEPS:
                layer.step(name, values)

    report(f"decode, one layer, batch {batch}", whole, per=count)


def prefill(width: int, batch: int, length: int) -> None:
    layer = Layer(width, batch)
    inner, size, s = 2 * width, layer.A.shape[1], layer.scale
    h, u, g = torch.randn(batch, length, width), int8(batch, length, width), torch.randn(batch, length, inner)
    xz, x, dt = int8(batch, length, 2 * inner), int8(batch, length, inner), int8(batch, length, inner)
    dbc = int8(batch, length, layer.split[0] + 2 * size)
    d, B, C = dbc.split(layer.split, dim=-1)
    weight, weight_scale, bias = layer.conv
    cases: dict[str, Callable[[], object]] = {
        "rms_norm_quant": lambda: ops.rms_norm_quant(h, layer.norm, s["u"], 1e-5),
        "linear in_proj": lambda: layer.linear("in", u, "u", layer.xz_scale),
        "causal_conv1d": lambda: ops.causal_conv1d(
            xz[..., :inner], s["x0"], weight, weight_scale, bias, s["x"], torch.int8, None, layer.conv_state
        ),
        "linear x_proj": lambda: layer.linear("x", x, "x", layer.dbc_scale),
        "linear dt_proj": lambda: layer.linear("dt", d, "d", s["dt"]),
        "selective_scan": lambda: ops.selective_scan(
            *(x, s["x"], dt, s["dt"], layer.dt_bias, layer.A, B, s["B"], C, s["C"]),
            *(layer.D, xz[..., inner:], s["z"], None, torch.float32, layer.state),
        ),
        "hadamard_quant": lambda: ops.hadamard_quant(g, s["g"]),
        "linear out_proj": lambda: layer.linear("out", x, "g", None, h),
    }
    for name, case in cases.items():
        report(f"{name}, batch {batch}, length {length}", case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--model-width", type=int, default=256)
    parser.add_argument("--decode-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.threads} threads, model width {options.model_width}")
    print(f"{'op':44s} {'wall us':>10s} {'cpu us':>10s}")
    with torch.no_grad():
        for batch in (1, 8):
            decode(options.model_width, batch, options.layers)
        if not options.decode_only:
            for batch in (1, 8):
                prefill(options.model_width, batch, 512)


if __name__ == "__main__":
    main()
