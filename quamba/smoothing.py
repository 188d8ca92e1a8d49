"""Smoothing: the divisors of u, g and the head's input, from what a pass over the data has seen of their channels."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quamba.models.adapter import Adapter
from quamba.nn.mixer import Mixer
from quamba.observation import Statistics
from quamba.recipe import QuantSpec, Recipe
from quamba.transforms import Transforms, smoothing_divisor

# How far the divisors of the head's input go from their mean where its weight is also the embedding's table: each
# factor of two costs the looked-up rows a bit.
_TIED_RANGE = 2.0


def smoothing_plan(recipe: Recipe, layers: Iterable[int]) -> dict[str, QuantSpec]:
    """The addresses whose channels the recipe's smoothing steps need to know."""
    sites = {"smooth_input": "u", "smooth_output": "g"}
    ends = {} if recipe.head_smoothing is None else {"head.input": QuantSpec("channel")}
    return ends | {
        f"layers.{layer}.{sites[step.name]}": QuantSpec("channel")
        for layer in layers
        for step in recipe.block(layer).steps
        if step.name in sites
    }


@torch.no_grad()
def find_transforms(recipe: Recipe, mixers: Mapping[int, Mixer], statistics: Statistics) -> dict[int, Transforms]:
    """The coordinates of every block, from the recipe's steps and the channels' magnitudes."""
    found = {}
    for layer, mixer in mixers.items():
        format = recipe.block(layer)
        tensors = mixer.tensors()
        divisors: dict[str, Tensor | None] = {"u": None, "g": None}
        for site, step_name, weight in (("u", "smooth_input", "in_proj"), ("g", "smooth_output", "out_proj")):
            step = format.step(step_name)
            if step is not None and step.alpha is not None:
                columns = tensors[f"{weight}.weight"].abs().amax(dim=0)
                divisor = smoothing_divisor(statistics.alpha(f"layers.{layer}.{site}"), columns, step.alpha)
                divisors[site] = _storable(divisor, tensors["norm.weight"] if site == "u" else None, mixer.config.dtype)
        found[layer] = Transforms(
            u_divisor=divisors["u"],
            rotate_u=recipe.rotates_residual,
            rotate_x=format.step("rotate_x") is not None,
            g_divisor=divisors["g"],
            rotate_g=format.step("rotate_output") is not None,
        )
    return found


@torch.no_grad()
def reach_channels(
    recipe: Recipe,
    mixers: Mapping[int, Mixer],
    transforms: Mapping[int, Transforms],
    *,
    statistics: Statistics,
    alphas: Mapping[str, Tensor],
) -> dict[int, Transforms]:
    """The coordinates in which no channel of u goes further beyond its clip than the step smooth_input says.

    Args:
        recipe: the recipe.
        mixers: by layer.
        transforms: of `find_transforms`.
        statistics: the channels' magnitudes that those were found from.
        alphas: clipping magnitude of every static site, in the coordinates of `transforms`. They still hold: the
            channels that change only come closer.
    """
    found = dict(transforms)
    for layer, mixer in mixers.items():
        step, address, divisor = recipe.block(layer).step("smooth_input"), f"layers.{layer}.u", found[layer].u_divisor
        if step is None or step.reach is None or divisor is None or address not in alphas:
            continue
        beyond = statistics.alpha(address) / divisor / (step.reach * alphas[address])
        further = _storable(divisor * beyond, mixer.tensors()["norm.weight"], mixer.config.dtype)
        found[layer] = replace(found[layer], u_divisor=torch.where(beyond > 1, further, divisor))
    return found


@torch.no_grad()
def find_head_divisor(recipe: Recipe, *, model: nn.Module, adapter: Adapter, statistics: Statistics) -> Tensor | None:
    """(E,) float32 by which head.input is divided, from the channels' magnitudes; None where the recipe does not."""
    strength = recipe.head_smoothing
    if strength is None:
        return None
    weight: Any = model.get_submodule(adapter.head(model)).weight
    columns = torch.maximum(weight.amax(dim=0), -weight.amin(dim=0))
    alpha = statistics.alpha("head.input")
    divisor = smoothing_divisor(alpha, columns.to(alpha.device), strength)
    return divisor.clamp(1 / _TIED_RANGE, _TIED_RANGE) if adapter.tied(model) else divisor


def _storable(divisor: Tensor, gamma: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The nearest divisor for which what is stored in the model's dtype is exact: itself, or gamma / divisor."""
    if gamma is None:
        return divisor.to(dtype).to(torch.float32)
    gamma = gamma.to(torch.float32)
    stored = (gamma / divisor).to(dtype).to(torch.float32)
    return torch.where(stored == 0, torch.ones_like(divisor), gamma / stored)
