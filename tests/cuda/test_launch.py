"""Kernels that start before the one before them ends: chains of them, where each reads what the last one wrote."""

import pytest
import torch
from torch import Tensor

from quamba import ops
from tests.cuda.compare import randint8, randn, scales

E, D, N, R = 320, 640, 16, 48


def chain(batch: int, after, *, fused: bool = True) -> list[Tensor]:
    """Some blocks' step from a fixed start; `after` is called behind every op. fused: W_in and convolution, and
    W_dt and scan, in one op each."""
    torch.manual_seed(3)
    weights = {name: randint8(*shape) for name, shape in (("in", (2 * D, E)), ("x", (R + 2 * N, D)), ("out", (E, D)))}
    dt_weight, taps = randint8(D, R), randint8(D, 4)
    conv, ssm = randint8(batch, D, 4), randn(batch, D, N)
    norm, bias, skip, A = randn(E), randn(D) - 4, randn(D), -torch.rand(D, N, device="cuda") * 4
    hidden = randn(batch, E)
    in_scale, x_scale, out_scale = scales(2 * D, mean=2.0), scales(R + 2 * N, mean=4.0), scales(D, mean=0.3)
    one, small = scales(), scales(mean=1e-4)
    torch.cuda.synchronize()

    def did(value: Tensor) -> Tensor:
        after()
        return value

    for _ in range(6):
        u = did(ops.rms_norm_quant(hidden, norm, one, 1e-5))
        if fused:
            x, z = ops.linear_conv1d_step(u, one, weights["in"], one, None, in_scale, taps, one, bias, out_scale, conv)
            after()
        else:
            xz = did(ops.linear(u, one, weights["in"], one, None, None, in_scale, torch.int8))
            x0, z = xz.split(D, dim=-1)
            x = did(ops.causal_conv1d_step(x0, in_scale[:D], taps, one, bias, out_scale, torch.int8, conv))
        dbc = did(ops.linear(x, one, weights["x"], one, None, None, x_scale, torch.int8))
        d, B, C = dbc.split([R, N, N], dim=-1)
        scan = (bias, A, B, one, C, one, skip, z, one, None, torch.float16, ssm)
        if fused:
            g = did(ops.selective_scan_dt_step(x, one, d, one, dt_weight, small, None, *scan))
        else:
            dt = did(ops.linear(d, one, dt_weight, small, None, None, None, torch.float32))
            g = did(ops.selective_scan_step(x, one, dt, None, *scan))
        q = did(ops.hadamard_quant(g, one))
        hidden = did(ops.linear(q, one, weights["out"], small, None, hidden, None, torch.float32))
    torch.cuda.synchronize()
    return [hidden, conv, ssm]


@pytest.mark.parametrize("batch", [1, 9, 16, 33, 64, 130])
@pytest.mark.parametrize("kernel", [None, "ring", "64x80"])
def test_chain(monkeypatch: pytest.MonkeyPatch, batch: int, kernel: str | None) -> None:
    if kernel is not None:
        monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", kernel)
    expected = chain(batch, torch.cuda.synchronize)
    assert all(value.float().isfinite().all() for value in expected)
    for _ in range(20):
        for fused in (False, True):
            for actual, value in zip(chain(batch, lambda: None, fused=fused), expected, strict=True):
                assert torch.equal(actual, value)


def prefill(length: int, after) -> list[Tensor]:
    """Some blocks over two sequences from a fixed start; `after` is called behind every op."""
    torch.manual_seed(5)
    weights = {name: randint8(*shape) for name, shape in (("in", (2 * D, E)), ("x", (R + 2 * N, D)), ("out", (E, D)))}
    dt_weight, taps, table = randint8(D, R), randint8(D, 4), randint8(50, E)
    conv, ssm = randint8(2, D, 4), randn(2, D, N)
    norm, bias, skip, A = randn(E), randn(D) - 4, randn(D), -torch.rand(D, N, device="cuda") * 4
    ids = torch.randint(0, 50, (2, length), device="cuda")
    in_scale, x_scale, out_scale = scales(2 * D, mean=2.0), scales(R + 2 * N, mean=4.0), scales(D, mean=0.3)
    one, small, dt_scale = scales(), scales(mean=1e-4), scales(mean=5e-4)
    torch.cuda.synchronize()

    def did(value: Tensor) -> Tensor:
        after()
        return value

    hidden = did(ops.embedding(ids, table, scales(50), None, torch.float32))
    for _ in range(4):
        u = did(ops.rms_norm_quant(hidden, norm, one, 1e-5))
        xz = did(ops.linear(u, one, weights["in"], one, None, None, in_scale, torch.int8))
        x0, z = xz.split(D, dim=-1)
        x = did(ops.causal_conv1d(x0, in_scale[:D], taps, one, bias, out_scale, torch.int8, None, conv))
        dbc = did(ops.linear(x, one, weights["x"], one, None, None, x_scale, torch.int8))
        d, B, C = dbc.split([R, N, N], dim=-1)
        dt = did(ops.linear(d, one, dt_weight, small, None, None, dt_scale, torch.int8))
        scan = (bias, A, B, one, C, one, skip, z, one, None, torch.float16, ssm)
        g = did(ops.selective_scan(x, one, dt, dt_scale, *scan))
        q = did(ops.hadamard_quant(g, one))
        hidden = did(ops.linear(q, one, weights["out"], small, None, hidden, None, torch.float32))
    torch.cuda.synchronize()
    return [hidden, conv, ssm]


TILES = ["128x256", "128x192", "128x128", "64x64", "64x80", "128x160", "256x192", "128x80", "128x96"]


@pytest.mark.parametrize("length", [40, 300, 1030])
@pytest.mark.parametrize("kernel", [None, "short", "strips", "ring", "pairs", "halves", "quads", "slices", *TILES])
def test_prefill(monkeypatch: pytest.MonkeyPatch, length: int, kernel: str | None) -> None:
    if kernel is not None:
        monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", kernel)
    expected = prefill(length, torch.cuda.synchronize)
    assert all(value.float().isfinite().all() for value in expected)
    for _ in range(20):
        for actual, value in zip(prefill(length, lambda: None), expected, strict=True):
            assert torch.equal(actual, value)


@pytest.mark.parametrize("columns", [1536, 4096, 5120])
def test_many_rows(columns: int) -> None:
    """The kernels whose blocks go through rows, which are as many as run at a time."""

    def run(after) -> Tensor:
        torch.manual_seed(6)
        weights = randint8(columns, E), randint8(E, columns)
        norm, one, small = randn(E), scales(), scales(mean=1e-4)
        hidden = randn(2600, E, dtype=torch.float16)
        torch.cuda.synchronize()
        for _ in range(6):
            u = ops.rms_norm_quant(hidden, norm, one, 1e-5)
            after()
            g = ops.linear(u, one, weights[0], small, None, None, None, torch.float16)
            after()
            q = ops.hadamard_quant(g, one)
            after()
            hidden = ops.linear(q, one, weights[1], small, None, hidden, None, torch.float16)
            after()
        torch.cuda.synchronize()
        return hidden

    expected = run(torch.cuda.synchronize)
    assert expected.float().isfinite().all()
    for _ in range(20):
        assert torch.equal(run(lambda: None), expected)


def test_graph_of_a_chain() -> None:
    """In a graph the launches follow each other faster than from the host."""
    torch.manual_seed(4)
    weight, norm = randint8(E, E), randn(E)
    one, small = scales(), scales(mean=2e-3)
    start = randn(16, E)

    def run(hidden: Tensor, after) -> Tensor:
        for _ in range(100):
            u = ops.rms_norm_quant(hidden, norm, one, 1e-5)
            after()
            hidden = ops.linear(u, one, weight, small, None, hidden, None, torch.float32)
            after()
        return hidden

    expected = run(start, torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = run(start, lambda: None)
    for _ in range(20):
        actual.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(actual, expected)
