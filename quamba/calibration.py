"""Calibration: run the float model over the data and keep what the observers need, site by site."""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from quamba import numerics
from quamba.data import Batch, KeptBatches, vocabulary
from quamba.errors import CalibrationError
from quamba.models.adapter import Adapter
from quamba.nn.mixer import Mixer
from quamba.observers import Observer, make_observer
from quamba.progress import track
from quamba.quantization import SiteStatistics
from quamba.recipe import QuantSpec, Recipe
from quamba.transforms import Transforms, smoothing_divisor

Plan = Mapping[str, QuantSpec]
# How far the divisors of the head's input go from their mean where its weight is also the embedding's table: each
# factor of two costs the looked-up rows a bit.
_TIED_RANGE = 2.0


@dataclass
class Statistics:
    """What was observed, by address. Statistics of shards of the data merge into those of the whole."""

    observers: dict[str, Observer] = field(default_factory=dict)

    def update(self, address: str, spec: QuantSpec, values: Tensor) -> None:
        """Add values (T, D) of one site, padding removed."""
        if address not in self.observers:
            self.observers[address] = make_observer(spec)
        try:
            self.observers[address].update(values)
        except CalibrationError as error:
            raise CalibrationError(f"{address}: {error}") from error

    def merge(self, other: "Statistics") -> None:
        """Take in the statistics of another shard, observed with the same plan."""
        for address, observer in other.observers.items():
            if address in self.observers:
                self.observers[address].merge(observer)
            else:
                self.observers[address] = observer

    def alpha(self, address: str) -> Tensor:
        """The clipping magnitude of one address. Raises CalibrationError where nothing was observed."""
        if address not in self.observers:
            raise CalibrationError(
                f"found no statistic for {address}; expected calibration data with at least one token: pass calib_data"
            )
        return self.observers[address].alpha()

    def alphas(self, plan: "Plan") -> dict[str, Tensor]:
        """The clipping magnitude of every planned address, with the headroom that its spec asks for."""
        return {address: spec.headroom * self.alpha(address) for address, spec in plan.items()}


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
def collect(
    *,
    model: nn.Module,
    adapter: Adapter,
    mixers: Mapping[int, Mixer],
    plan: Plan,
    batches: Iterable[Batch],
    description: str = "calibrating",
    total: int | None = None,
    show: bool | None = None,
    head_divisor: Tensor | None = None,
) -> Statistics:
    """Run the model over the batches and observe the planned addresses.

    Args:
        model: with our float mixers installed.
        adapter: the model's.
        mixers: the installed mixers by layer; each observes in the coordinates of its `transforms`.
        plan: address -> spec.
        batches: calibration data.
        description, total, show: of the progress bar.
        head_divisor: (E,) by which head.input is divided before it is observed, or None.

    Raises:
        CalibrationError: a site produced NaN or infinite values; the message names its address.
    """
    statistics = Statistics()
    _run(
        model=model,
        adapter=adapter,
        mixers=mixers,
        batches=track(batches, description, total=total, show=show),
        addresses=plan,
        head_divisor=head_divisor,
        see=lambda address, values: statistics.update(address, plan[address], values),
    )
    return statistics


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


def _run(
    *,
    model: nn.Module,
    adapter: Adapter,
    mixers: Mapping[int, Mixer],
    batches: Iterable[Batch],
    addresses: Container[str],
    head_divisor: Tensor | None,
    see: Callable[[str, Tensor], None],
) -> None:
    """Run the batches and hand the values (T, D) of each of the addresses, padding removed, to `see`."""

    def look(address: str, value: Tensor, mask: Tensor | None) -> None:
        if address in addresses:
            see(address, _tokens(value, mask))

    def watch(layer: int, mixer: Mixer) -> None:
        mixer.observer = lambda site, value, mask: look(f"layers.{layer}.{site}", value, mask)

    try:
        for layer, mixer in mixers.items():
            watch(layer, mixer)
        for batch in batches:
            hidden = adapter.run_backbone(model, batch.input_ids, batch.mask)
            look("head.input", hidden if head_divisor is None else hidden / head_divisor, batch.mask)
    finally:
        for mixer in mixers.values():
            mixer.observer = None


def _tokens(value: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L, D) -> (T, D): the tokens that are not padding."""
    return value.flatten(0, 1) if mask is None else value[mask.to(torch.bool)]


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


def _storable(divisor: Tensor, gamma: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The nearest divisor for which what is stored in the model's dtype is exact: itself, or gamma / divisor."""
    if gamma is None:
        return divisor.to(dtype).to(torch.float32)
    gamma = gamma.to(torch.float32)
    stored = (gamma / divisor).to(dtype).to(torch.float32)
    return torch.where(stored == 0, torch.ones_like(divisor), gamma / stored)


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

    _run(
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
