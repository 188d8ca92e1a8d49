"""The error bound for systems with known state matrices: HiPPO-LegT and HiPPO-LegS with a quantized input.

For c_t = A_t c_(t-1) + B_t x_t and an input whose error is at most eps, the error of the state is at most

    eps * sum over k <= t of |A_t ... A_(k+1) B_k|                                   (running bound)

and, where A and B do not depend on t and a norm gives A the value a < 1 and B the value b, at most

    eps * b / (1 - a)                                                                (closed form)

for any t (Quamba, section 4.1: the error of a decaying linear system does not compound). Norms are Euclidean; since
LegT's A is no contraction in that one, its closed form uses the norm |v|_P = sqrt(v P v) of the Lyapunov equation
A' P A - P = -I, in which a = sqrt(1 - 1 / max eig P), and comes back to the Euclidean one by 1 / sqrt(min eig P).

The matrices are those of Gu et al. 2020, "HiPPO: Recurrent Memory with Optimal Polynomial Projections", theorems 1
and 2, in the orthonormal basis, discretized by the bilinear transform.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quamba import numerics
from quamba.errors import QuambaError

SYSTEMS = ("LegT", "LegS")
# Steps in LegT's window.
_WINDOW = 256
# Doublings of the Lyapunov series: 2^40 steps.
_DOUBLINGS = 40


@dataclass(frozen=True, eq=False)
class Bound:
    """One system: the measured error of its state beside the bounds.

    Attributes:
        system: one of SYSTEMS.
        states: N.
        eps: float64 (R,), the largest possible error of each run's input: half its quantization step.
        error: float64 (R, L), Euclidean norm of the state's error in each run, over that run's eps.
        state: float64 (R, L), norm of the exact state.
        running: float64 (L,), the running bound over eps.
        closed: the closed form over eps; None for LegS, whose matrices depend on t.
    """

    system: str
    states: int
    eps: Tensor
    error: Tensor
    state: Tensor
    running: Tensor
    closed: float | None

    def nmse(self) -> Tensor:
        """float64 (L,): squared error over squared state, summed over the runs."""
        return (self.error * self.eps[:, None]).square().sum(dim=0) / self.state.square().sum(dim=0)


def legt(states: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegT over a window of length 1: float64 A (N, N), B (N,) of dc/dt = A c + B x."""
    n = torch.arange(states, dtype=torch.float64)
    row, column = n[:, None], n[None, :]
    scale = ((2 * row + 1) * (2 * column + 1)).sqrt()
    sign = torch.where((row - column) % 2 == 0, 1.0, -1.0).to(torch.float64)
    a = -scale * torch.where(row >= column, sign, torch.ones_like(sign))
    b = (2 * n + 1).sqrt() * torch.where(n % 2 == 0, 1.0, -1.0)
    return a, b


def legs(states: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS: float64 A (N, N), B (N,) of dc/dt = (A c + B x) / t."""
    n = torch.arange(states, dtype=torch.float64)
    row, column = n[:, None], n[None, :]
    below = ((2 * row + 1) * (2 * column + 1)).sqrt()
    a = -torch.where(row > column, below, torch.zeros_like(below)) - torch.diag(n + 1)
    return a, (2 * n + 1).sqrt()


def steps(system: str, *, states: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The discrete A_t (N, N) and B_t (N,) of steps 1 to L, bilinear; LegT's window has the length of 256 steps.

    Raises:
        QuambaError: the system has another name, or a size is not positive.
    """
    if system not in SYSTEMS or states < 1 or length < 1:
        raise QuambaError(f"found {system!r}, states {states}, length {length}; expected {SYSTEMS} and positive sizes")
    if system == "LegT":
        discrete = _bilinear(*legt(states), 1 / _WINDOW)
        yield from (discrete for _ in range(length))
    else:
        a, b = legs(states)
        yield from (_bilinear(a, b, 1 / t) for t in range(1, length + 1))


def _bilinear(a: Tensor, b: Tensor, dt: float) -> tuple[Tensor, Tensor]:
    eye = torch.eye(a.shape[0], dtype=a.dtype)
    solved = torch.linalg.solve(eye - dt / 2 * a, torch.cat([eye + dt / 2 * a, dt * b[:, None]], dim=1))
    return solved[:, :-1], solved[:, -1]


def signals(runs: int, length: int, *, seed: int = 0) -> Tensor:
    """float64 (R, L): smoothed Gaussian noise with a few large values, so that an absmax scale is coarse."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(runs, length, generator=generator, dtype=torch.float64)
    smooth = torch.nn.functional.avg_pool1d(noise[:, None], 9, stride=1, padding=4)[:, 0] * 3
    loud = torch.rand(runs, length, generator=generator) < 0.005
    return torch.where(loud, 6 * noise, smooth)


@torch.no_grad()
def error_bound(system: str, *, states: int = 64, length: int = 1024, runs: int = 16, seed: int = 0) -> Bound:
    """Feed a system exact and INT8-quantized signals and compare the states with the bounds.

    Args:
        system: one of SYSTEMS.
        states, length, runs: N, L, R.
        seed: of the signals.

    Raises:
        QuambaError: the system has another name, or a size is not positive.
    """
    x = signals(runs, length, seed=seed)
    scale = numerics.scale_from_alpha(x.abs().amax(dim=1, keepdim=True))
    quantized = numerics.dequantize(numerics.quantize(x, scale), scale).to(torch.float64)
    eps = scale[:, 0].to(torch.float64) / 2
    exact, rounded = (torch.zeros(runs, states, dtype=torch.float64) for _ in range(2))
    errors, norms, running = [], [], []
    # Column k is A_t ... A_(k+1) B_k.
    reach = torch.zeros(states, 0, dtype=torch.float64)
    for t, (a, b) in enumerate(steps(system, states=states, length=length)):
        exact = exact @ a.T + x[:, t, None] * b
        rounded = rounded @ a.T + quantized[:, t, None] * b
        reach = torch.cat([a @ reach, b[:, None]], dim=1)
        errors.append((rounded - exact).norm(dim=1) / eps)
        norms.append(exact.norm(dim=1))
        running.append(reach.norm(dim=0).sum())
    closed = None
    if system == "LegT":
        closed = closed_form(*next(steps(system, states=states, length=1)))
    return Bound(
        system=system,
        states=states,
        eps=eps,
        error=torch.stack(errors, dim=1),
        state=torch.stack(norms, dim=1),
        running=torch.stack(running),
        closed=closed,
    )


def closed_form(a: Tensor, b: Tensor) -> float:
    """b / (1 - a) of a time-invariant discrete system, in the Lyapunov norm, as a bound of the Euclidean one.

    Args:
        a: float64 (N, N), with eigenvalues inside the unit circle.
        b: float64 (N,).

    Raises:
        QuambaError: the system does not decay.
    """
    radius = float(torch.linalg.eigvals(a).abs().max())
    if radius >= 1:
        raise QuambaError(f"found a system with spectral radius {radius:.6g}; expected less than 1: it does not decay")
    p = torch.eye(a.shape[0], dtype=a.dtype)
    power = a
    for _ in range(_DOUBLINGS):
        p = p + power.T @ p @ power
        power = power @ power
    eigenvalues = torch.linalg.eigvalsh(p)
    contraction = (1 - 1 / eigenvalues[-1]).sqrt()
    return float((b @ p @ b).sqrt() / (1 - contraction) / eigenvalues[0].sqrt())
