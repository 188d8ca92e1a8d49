"""Calibration: the passes over the data by which a recipe's coordinates and clipping magnitudes are found."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quamba import numerics
from quamba.data import Batch, KeptBatches, vocabulary
from quamba.models.adapter import Adapter
from quamba.nn.mixer import Mixer
from quamba.observation import Plan, Statistics, collect, observe
from quamba.quantization import SiteStatistics
from quamba.recipe import QuantSpec, Recipe
from quamba.smoothing import find_head_divisor, find_transforms, reach_channels, smoothing_plan
from quamba.transforms import Transforms


def static_plan(recipe: Recipe, layers: Iterable[int]) -> dict[str, QuantSpec]:
    """The activation addresses whose scales calibration has to find."""
    plan = {}
    for layer in layers:
        for site, spec in recipe.block(layer).activations.items():
            if spec is not None and spec.granularity != "token":
                plan[f"layers.{layer}.{site}"] = spec
    head = recipe.spec("head.input")
    if recipe.spec("head.weight") is not None and head is not None and head.granularity != "token":
        plan["head.input"] = head
    return plan


def cover_vocabulary(
    alphas: Mapping[str, Tensor],
    *,
    model: nn.Module,
    adapter: Adapter,
    mixers: Mapping[int, Mixer],
    plan: Plan,
    show: bool | None = None,
    head_divisor: Tensor | None = None,
) -> dict[str, Tensor]:
    """The magnitudes, none below the largest over the vocabulary where its spec asks for that.

    In the first block this is all that x0 and z can ever be: they depend on one token each. Further on, and for what
    the convolution mixes, it is a sample of what rare tokens do.

    Args:
        alphas: of the planned addresses.
        model, adapter, mixers, plan, show, head_divisor: as for `collect`.

    Raises:
        CalibrationError: as `collect`.
    """
    covered = {address: spec for address, spec in plan.items() if spec.vocabulary}
    if not covered:
        return dict(alphas)
    table: Any = model.get_submodule(adapter.embedding(model)).weight
    statistics = collect(
        model=model, adapter=adapter, mixers=mixers, plan=covered, batches=vocabulary(len(table), device=table.device),
        description="vocabulary", show=show, head_divisor=head_divisor,
    )  # fmt: skip
    return {**alphas, **{a: torch.maximum(alphas[a], statistics.alpha(a)) for a in covered}}


@dataclass(frozen=True)
class Calibrated:
    """What calibration found for a recipe.

    Attributes:
        transforms: by layer.
        head_divisor: (E,) float32 by which head.input is divided, or None.
        statistics: of the planned addresses, in the coordinates of calibration.
        alphas: clipping magnitude of every planned address.
    """

    transforms: Mapping[int, Transforms]
    head_divisor: Tensor | None
    statistics: Statistics
    alphas: dict[str, Tensor]


def calibrate(
    recipe: Recipe,
    *,
    model: nn.Module,
    adapter: Adapter,
    mixers: Mapping[int, Mixer],
    plan: Plan,
    data: KeptBatches | None,
    show: bool | None = None,
) -> Calibrated:
    """The passes over the data: the channels' ranges, from which the coordinates follow, then every planned address in
    them. The mixers are left in the coordinates that were found.

    Args:
        recipe, model, adapter, mixers, plan, show: as for `collect`.
        data: calibration data; None where the recipe needs none.

    Raises:
        CalibrationError: as `collect`.
    """

    def seen(plan: Plan, description: str, head_divisor: Tensor | None = None) -> Statistics:
        if not plan or data is None:
            return Statistics()
        return collect(
            model=model, adapter=adapter, mixers=mixers, plan=plan, batches=data,
            description=description, total=data.total, show=show, head_divisor=head_divisor,
        )  # fmt: skip

    def turn(transforms: Mapping[int, Transforms]) -> None:
        for layer, mixer in mixers.items():
            mixer.transforms = transforms[layer]

    ranges = seen(smoothing_plan(recipe, mixers), "channel ranges")
    transforms = find_transforms(recipe, mixers, ranges)
    head_divisor = find_head_divisor(recipe, model=model, adapter=adapter, statistics=ranges)
    turn(transforms)
    statistics = seen(plan, "calibrating", head_divisor)
    alphas = cover_vocabulary(
        statistics.alphas(plan), model=model, adapter=adapter, mixers=mixers, plan=plan, show=show,
        head_divisor=head_divisor,
    )  # fmt: skip
    transforms = reach_channels(recipe, mixers, transforms, statistics=ranges, alphas=alphas)
    turn(transforms)
    return Calibrated(transforms, head_divisor, statistics, alphas)


def head_scale(alphas: Mapping[str, Tensor], divisor: Tensor | None) -> Tensor | None:
    """The scale of head.input, float32 (), or (E,) with a divisor; None where it has no static one."""
    if "head.input" not in alphas:
        return None
    scale = numerics.scale_from_alpha(alphas["head.input"])
    return scale if divisor is None else scale * divisor


@torch.no_grad()
def measure_sites(
    *,
    model: nn.Module,
    adapter: Adapter,
    mixers: Mapping[int, Mixer],
    alphas: Mapping[str, Tensor],
    bits: Mapping[str, int],
    batches: Iterable[Batch],
    head_divisor: Tensor | None = None,
) -> dict[str, SiteStatistics]:
    """What the chosen scales do to each site's values: share clipped, and SQNR, over the given batches."""
    sums: dict[str, list[float]] = {address: [0.0, 0.0, 0.0, 0.0] for address in alphas}

    def measure(address: str, value: Tensor) -> None:
        value = value.to(torch.float32)
        alpha = alphas[address].to(value.device)
        scale = numerics.scale_from_alpha(alpha, bits=bits[address])
        error = numerics.simulate(value, scale, bits=bits[address]) - value
        total = sums[address]
        total[0] += float((value.abs() > alpha).sum())
        total[1] += value.numel()
        total[2] += float(value.square().sum(dtype=torch.float64))
        total[3] += float(error.square().sum(dtype=torch.float64))

    observe(
        model=model, adapter=adapter, mixers=mixers, batches=batches, addresses=alphas, head_divisor=head_divisor,
        see=measure,
    )  # fmt: skip
    tiny = torch.finfo(torch.float64).tiny
    return {
        address: SiteStatistics(
            alpha=float(alphas[address].max()),
            clipped=clipped / max(count, 1.0),
            sqnr_db=float(10 * torch.log10(torch.tensor(max(signal, tiny) / max(noise, tiny), dtype=torch.float64))),
        )
        for address, (clipped, count, signal, noise) in sums.items()
    }
