"""The tap sees the scan's output, and quantizes it, in either mixer."""

import numpy as np
import pytest
import torch

from quamba import ops
from quamba.analysis.tap import QuantizedScanOutput, Scan, ScanTap
from quamba.recipes import RECIPES
from tests.analysis.tools import rounded, scan, silu, sites_of
from tests.tiny import hidden_states, make_mixer, quantize_mixer


@torch.no_grad()
def test_sees_y_dt_and_a_of_the_float_mixer() -> None:
    mixer, hidden = make_mixer(), hidden_states(2, 9, 24)
    seen: list[Scan] = []
    with ScanTap(seen.append):
        out = mixer(hidden)
    assert torch.equal(out, mixer(hidden))
    (found,) = seen
    sites = sites_of(mixer, hidden)
    np.testing.assert_allclose(found.y.numpy(), scan(mixer, sites), rtol=1e-4, atol=1e-5)
    expected = np.logaddexp(0, sites["dt"] + mixer.tensors()["dt_bias"].double().numpy())
    np.testing.assert_allclose(found.dt.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(found.A.numpy(), -np.exp(mixer.tensors()["A_log"].numpy()), rtol=1e-6)


@pytest.mark.parametrize("recipe", ["naive", "quamba-c"])
@torch.no_grad()
def test_sees_the_quantized_mixer_without_changing_it(recipe: str) -> None:
    mixer, hidden = make_mixer(), hidden_states(2, 9, 24)
    quantized = quantize_mixer(mixer, RECIPES[recipe].block(0), hidden)
    seen: list[Scan] = []
    with ScanTap(seen.append):
        out = quantized(hidden)
    assert torch.equal(out, quantized(hidden))
    divisor = getattr(quantized, "g_divisor", torch.ones(()))
    y = scan(mixer, sites_of(mixer, hidden))
    error = (seen[0].y * divisor).numpy() - y
    assert 0 < (error**2).sum() < 0.03 * (y**2).sum()


@torch.no_grad()
def test_quantizes_y_before_the_gate() -> None:
    mixer, hidden = make_mixer(), hidden_states(2, 9, 24)
    sites = sites_of(mixer, hidden)
    # A clipping scale, so that both rounding and clamping show.
    y = scan(mixer, sites)
    alpha = 0.5 * np.abs(y).max()
    gated = rounded(y, alpha) * silu(sites["z"])
    expected = hidden.double().numpy() + gated @ mixer.tensors()["out_proj.weight"].double().numpy().T
    found = QuantizedScanOutput(mixer, torch.tensor(alpha / 127, dtype=torch.float32))(hidden)
    # A value next to the middle between two steps may round the other way in float32.
    off = np.abs(found.numpy() - expected) > 1e-4 * np.abs(expected).max()
    assert off.mean() < 0.02
    assert not torch.allclose(found, mixer(hidden), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_leaves_the_state_as_the_op_does() -> None:
    mixer, hidden = make_mixer(), hidden_states(1, 6, 24)
    plain, tapped = (mixer.new_state(1, torch.device("cpu")) for _ in range(2))
    mixer(hidden, state=plain)
    with ScanTap(y_scale=torch.tensor(0.1)):
        mixer(hidden, state=tapped)
    assert torch.equal(plain.ssm, tapped.ssm)
    assert float(plain.ssm.abs().sum()) > 0


@torch.no_grad()
def test_other_ops_pass_through() -> None:
    seen: list[Scan] = []
    with ScanTap(seen.append):
        found = ops.hadamard(torch.ones(1, 4))
    torch.testing.assert_close(found, torch.tensor([[2.0, 0.0, 0.0, 0.0]]))
    assert seen == []
