"""HiPPO's systems do what they were made for, and the bounds hold."""

import math

import numpy as np
import pytest
import torch

from quamba.analysis.hippo import SYSTEMS, closed_form, error_bound, legs, legt, steps
from quamba.errors import QuambaError


def run(system: str, x: np.ndarray, states: int) -> np.ndarray:
    state = np.zeros(states)
    for (a, b), value in zip(steps(system, states=states, length=len(x)), x, strict=True):
        state = a.numpy() @ state + b.numpy() * value
    return state


def test_legt_remembers_its_window() -> None:
    """The coefficients are those of the last 256 inputs on orthonormal Legendre polynomials over the window."""
    t = np.arange(1200)
    x = np.sin(2 * np.pi * t / 300)
    state = run("LegT", x, 12)
    # P_n runs from the newest input, at -1, to the oldest, at 1.
    for delay in (40, 128, 200):
        position = 2 * delay / 256 - 1
        basis = [math.sqrt(2 * n + 1) * legendre(n, position) for n in range(12)]
        assert float(np.dot(state, basis)) == pytest.approx(x[-1 - delay], abs=0.03)


def legendre(n: int, x: float) -> float:
    return float(np.polynomial.legendre.legval(x, [0] * n + [1]))


def test_legs_projects_the_whole_history() -> None:
    """For x = t / T on [0, T] the coefficients are 1/2 and 1/(2 sqrt 3), and zeros."""
    state = run("LegS", np.arange(1, 2001) / 2000, 6)
    np.testing.assert_allclose(state, [0.5, 0.5 / math.sqrt(3), 0, 0, 0, 0], atol=2e-3)


def test_matrices_of_three_states() -> None:
    a, b = legt(3)
    r3, r5, r15 = math.sqrt(3), math.sqrt(5), math.sqrt(15)
    np.testing.assert_allclose(a.numpy(), [[-1, -r3, -r5], [r3, -3, -r15], [-r5, r15, -5]], rtol=1e-12)
    np.testing.assert_allclose(b.numpy(), [1, -r3, r5], rtol=1e-12)
    a, b = legs(3)
    np.testing.assert_allclose(a.numpy(), [[-1, 0, 0], [-r3, -2, 0], [-r5, -r15, -3]], rtol=1e-12)
    np.testing.assert_allclose(b.numpy(), [1, r3, r5], rtol=1e-12)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_error_is_under_the_bounds(system: str) -> None:
    found = error_bound(system, states=9, length=1100, runs=5, seed=3)
    assert found.error.shape == (5, 1100)
    assert bool((found.error <= found.running + 1e-4).all())
    assert float(found.error.max()) > 0.01
    if system == "LegT":
        assert found.closed is not None
        assert float(found.running.max()) < found.closed
    else:
        assert found.closed is None
    # It stays: the second half is no worse than the first.
    half = found.error.shape[1] // 2
    assert float(found.error[:, half:].max()) < 1.3 * float(found.error[:, :half].max())
    assert 0 < float(found.nmse()[-1]) < 1e-3


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_running_bound_is_the_sum_of_norms(system: str) -> None:
    found = error_bound(system, states=4, length=7, runs=1)
    matrices = [(a.numpy(), b.numpy()) for a, b in steps(system, states=4, length=7)]
    total = 0.0
    for k in range(7):
        vector = matrices[k][1]
        for a, _ in matrices[k + 1 :]:
            vector = a @ vector
        total += float(np.linalg.norm(vector))
    assert float(found.running[-1]) == pytest.approx(total, rel=1e-12)


def test_the_closed_form_of_one_state_is_b_over_one_minus_a() -> None:
    a, b = 0.9, 0.3
    found = closed_form(torch.tensor([[a]], dtype=torch.float64), torch.tensor([b], dtype=torch.float64))
    assert found == pytest.approx(b / (1 - a), rel=1e-9)


def test_what_does_not_decay_is_refused() -> None:
    with pytest.raises(QuambaError, match="decay"):
        closed_form(torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    with pytest.raises(QuambaError, match="'FouT'"):
        error_bound("FouT")
    with pytest.raises(QuambaError, match="states 0"):
        error_bound("LegS", states=0)
