"""Made-up results of the analysis, for the tests of what draws and writes them."""

import torch
from torch import Tensor

from quamba.analysis.decay import LEVELS, Decay
from quamba.analysis.hippo import SYSTEMS, Bound
from quamba.analysis.length import PositionErrors
from quamba.analysis.outliers import VIEWS, Outliers
from quamba.analysis.run import Analysis, Settings
from quamba.analysis.sensitivity import BlockErrors, Cost
from quamba.analysis.single import BLOCK_TENSORS, TENSORS

RECIPES = ("naive", "mine & <others>")
LAYERS = (0, 1, 3)
STEPS = 70


def positive(*shape: int, seed: int = 0) -> Tensor:
    """float64 values above zero."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01


def make_costs() -> tuple[Cost, ...]:
    return tuple(
        Cost(recipe, name, increase_percent=increase, stderr_percent=0.01 * i, kl=1e-4 * (1 + i), tokens=640)
        for recipe in RECIPES
        for i, (name, increase) in enumerate(zip((*TENSORS, "all"), [-0.02, 0.05, 11.0] * 7, strict=False))
    )


def make_errors(recipe: str) -> BlockErrors:
    """z, g and out_proj leave y alone; the second recipe keeps dt in float."""
    count = len(BLOCK_TENSORS)
    y = positive(count, len(LAYERS), STEPS, seed=1)
    for name in ("z", "g", "out_proj"):
        y[BLOCK_TENSORS.index(name)] = 0
    out = positive(count, len(LAYERS), STEPS, seed=2)
    if recipe != RECIPES[0]:
        for table in (y, out):
            table[BLOCK_TENSORS.index("dt")] = torch.nan
    signal = 100 * positive(len(LAYERS), STEPS, seed=3)
    return BlockErrors(recipe, BLOCK_TENSORS, LAYERS, y_noise=y, out_noise=out, y_signal=signal, out_signal=signal)


def make_outliers() -> dict[str, Outliers]:
    count = len(LAYERS)
    return {
        view: Outliers(
            view,
            LAYERS,
            absmax=5 * positive(count, 12, seed=i),
            sigma=positive(count, seed=i),
            median=positive(count, seed=i),
            kurtosis=3 + positive(count, seed=i),
        )
        for i, view in enumerate(VIEWS)
    }


def make_decay() -> Decay:
    steps = -torch.arange(1, STEPS + 1, dtype=torch.float64)
    slopes = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    quantiles = (slopes[:, None] * steps).expand(len(LAYERS), len(LEVELS), STEPS)
    return Decay(LAYERS, quantiles=quantiles, largest=0.001 * steps.expand(len(LAYERS), STEPS))


def make_bounds() -> tuple[Bound, ...]:
    return tuple(
        Bound(
            system,
            states=4,
            eps=positive(2),
            error=positive(2, STEPS),
            state=positive(2, STEPS),
            running=positive(STEPS) + 2,
            closed=9.0 if system == "LegT" else None,
        )
        for system in SYSTEMS
    )


def make_positions() -> PositionErrors:
    return PositionErrors(RECIPES, nmse=positive(2, STEPS), kl=positive(2, STEPS, seed=4), sequences=5)


def make_analysis() -> Analysis:
    about = {
        "model_type": "mamba",
        "parameters": 1234567,
        "dtype": "float32",
        "mamba_layers": 3,
        "calibration_tokens": 1024,
        "evaluation_tokens": 640,
        "settings": {"context": Settings().context},
        "date": "2026-01-02",
        "device": "cpu: <none>",
        "versions": {"torch": "2"},
        "seconds": 1.0,
    }
    return Analysis(
        about=about,
        errors=tuple(make_errors(recipe) for recipe in RECIPES),
        costs=make_costs(),
        outliers=make_outliers(),
        decay=make_decay(),
        bounds=make_bounds(),
        positions=make_positions(),
    )
