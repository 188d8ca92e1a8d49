"""quantize(): the whole pipeline on one page.

adapter -> our float mixers -> transforms -> calibration -> conversion -> the model, changed at the very end.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from quamba import calibration, search
from quamba.checkpoint import attach
from quamba.convert import empty_ends, empty_mixer, fill_mixer, simulate_mixer
from quamba.data import KeptBatches
from quamba.errors import CalibrationError, RecipeError, UnsupportedModelError
from quamba.models.adapter import Adapter, AnyMixer, Shell, find_adapter
from quamba.nn.ends import QuantizedEmbedding, QuantizedHead
from quamba.nn.mixer import Mixer
from quamba.nn.named import swap
from quamba.nn.quantized_mixer import QuantizedMixer
from quamba.quantization import Quantization, SiteStatistics
from quamba.recipe import Override, Recipe
from quamba.recipes import DEFAULT_RECIPE, get_recipe
from quamba.transforms import Transforms, fold

Model = TypeVar("Model", bound=nn.Module)
# Sequences over which the effect of the chosen scales is measured for the report.
_MEASURED_SEQUENCES = 8


def quantize(
    model: Model,
    calib_data: Iterable[Any] | None = None,
    recipe: str | Recipe = DEFAULT_RECIPE,
    *,
    samples: int | None = 512,
    percentile: float | str | None = None,
    keep: Iterable[str] = (),
    progress: bool | None = None,
) -> Model:
    """Quantize a Mamba, Falcon-Mamba or Jamba language model, in place.

    Args:
        model: a causal language model of transformers (Mamba, Falcon-Mamba, Jamba) or mamba-ssm
            (MambaLMHeadModel with Mamba-1), in float32, bfloat16 or float16, on any device.
        calib_data: token ids of typical text: an iterable of (B, L) or (L,) integer tensors, or of mappings with
            "input_ids" and perhaps "attention_mask", a DataLoader of either, or a datasets.Dataset with an
            "input_ids" column. None only where the recipe has no static scale.
        recipe: the name of one of quamba.RECIPES, or a Recipe.
        samples: how many sequences of calib_data to use; None for all.
        percentile: replaces the percentile at which x is clipped, such as 0.9999; "search" finds each layer's
            best by the divergence of the next-token distribution from the float model's.
        keep: globs of what stays in float: "layers.0", "layers.*.x", "head", "embedding".
        progress: show progress bars; None shows them on a terminal.

    Returns:
        The same model, with `model.quantization` saying what was done to it.

    Raises:
        UnsupportedModelError: quamba does not know the model, or it is quantized already.
        RecipeError: the recipe is malformed, or a glob matches nothing.
        CalibrationError: the data is malformed or empty, or the model produced NaN on it.
            After any error the model is as it was.
    """
    adapter = find_adapter(model)
    if any(isinstance(module, (Shell, QuantizedHead, QuantizedEmbedding)) for module in model.modules()):
        raise UnsupportedModelError("found a model that quamba has quantized already; expected a float model")
    recipe = _adjusted(get_recipe(recipe), percentile=percentile, keep=keep)
    layers = adapter.layers(model)
    recipe.check(layers)
    if percentile == "search" and calib_data is None:
        raise CalibrationError("found percentile='search' without calib_data; expected data to search on")

    training = model.training
    originals: dict[str, nn.Module] = {}
    mixers: dict[int, Mixer] = {}
    try:
        model.eval()
        for layer in layers:
            mixers[layer] = Mixer(adapter.config(model, layer), adapter.tensors(model, layer))
        for layer, mixer in mixers.items():
            originals |= adapter.install(model, layer, mixer)
        plan = calibration.static_plan(recipe, layers)
        data = None
        if plan or percentile == "search":
            if calib_data is None:
                raise CalibrationError(
                    f"found no calib_data for recipe {recipe.name!r}, which has static scales; expected token ids"
                )
            data = KeptBatches(
                calib_data,
                samples=samples,
                device=next(model.parameters()).device,
                vocab_size=_vocabulary(model, adapter),
            )
        converted, ends, quantization = _convert(
            model=model, adapter=adapter, mixers=mixers, recipe=recipe, data=data, searching=percentile == "search",
            progress=progress,
        )  # fmt: skip
    except BaseException:
        for name, module in originals.items():
            swap(model, name, module)
        model.train(training)
        raise
    originals.clear()
    _commit(model=model, adapter=adapter, converted=converted, ends=ends, recipe=recipe)
    attach(model, quantization)
    return model


def _vocabulary(model: nn.Module, adapter: Adapter) -> int:
    embedding: Any = model.get_submodule(adapter.embedding(model))
    return int(embedding.weight.shape[0])


def _adjusted(recipe: Recipe, *, percentile: float | str | None, keep: Iterable[str]) -> Recipe:
    if percentile is not None:
        spec = recipe.activations["x"]
        if spec is None or spec.granularity == "token":
            raise RecipeError(
                f"found percentile={percentile!r} for recipe {recipe.name!r}, whose x has no static scale"
            )
        if isinstance(percentile, str) and percentile != "search":
            raise RecipeError(f"found percentile={percentile!r}; expected a fraction such as 0.9999, or 'search'")
        if percentile == "search" and recipe.simulated:
            raise RecipeError(f"found percentile='search' for {recipe.label!r}; expected a fraction for a simulation")
        level = search.CANDIDATES[-1] if percentile == "search" else float(percentile)
        # A clip that was asked for is not undone by rare tokens.
        adjusted = replace(spec, observer="percentile", percentile=level, vocabulary=False)
        recipe = replace(recipe, activations={**recipe.activations, "x": adjusted})
    if isinstance(keep, str):
        raise RecipeError(f"found keep={keep!r}; expected a list of globs, such as [{keep!r}]")
    return recipe.with_overrides(Override(pattern) for pattern in keep)


def _convert(
    *,
    model: nn.Module,
    adapter: Adapter,
    mixers: dict[int, Mixer],
    recipe: Recipe,
    data: KeptBatches | None,
    searching: bool,
    progress: bool | None,
) -> tuple[dict[int, AnyMixer], dict[str, nn.Module], Quantization]:
    """Everything that can fail: the new modules, filled, while the model still has its float mixers."""
    plan = calibration.static_plan(recipe, mixers)
    found = calibration.calibrate(
        recipe, model=model, adapter=adapter, mixers=mixers, plan=plan, data=data, show=progress
    )
    transforms, head_divisor, alphas = found.transforms, found.head_divisor, found.alphas

    def measure(alphas: dict[str, Tensor]) -> dict[str, SiteStatistics]:
        if data is None or not alphas:
            return {}
        return calibration.measure_sites(
            model=model, adapter=adapter, mixers=mixers, alphas=alphas,
            bits={address: plan[address].bits for address in alphas}, batches=data.first(_MEASURED_SEQUENCES),
            head_divisor=head_divisor,
        )  # fmt: skip

    # Before the int8 weights are made beside the float ones, which is when memory is scarce.
    measured = {} if searching else measure(alphas)
    converted: dict[int, AnyMixer] = {}
    for layer, mixer in mixers.items():
        prefix = f"layers.{layer}."
        own = {address.removeprefix(prefix): a for address, a in alphas.items() if address.startswith(prefix)}
        format = recipe.block(layer)
        empty = empty_mixer(adapter, model, layer, recipe)
        if format.simulated:
            converted[layer] = simulate_mixer(mixer, format, transforms=transforms[layer], alphas=own)
        elif isinstance(empty, QuantizedMixer):
            converted[layer] = fill_mixer(empty, mixer, transforms=transforms[layer], alphas=own)
        else:
            converted[layer] = _float_mixer(mixer, transforms[layer])
    ends = _filled_ends(model=model, adapter=adapter, recipe=recipe, alphas=alphas, head_divisor=head_divisor)
    if searching and data is not None:
        clips = search.search_clips(
            model=model, adapter=adapter, mixers=mixers, converted=converted, ends=ends, transforms=transforms,
            statistics=found.statistics, plan=plan, batches=data.first(search.SEQUENCES), progress=progress,
        )  # fmt: skip
        alphas |= {f"layers.{layer}.x": alpha for layer, (_, alpha) in clips.items()}
        specs = {layer: replace(plan[f"layers.{layer}.x"], percentile=level) for layer, (level, _) in clips.items()}
        recipe = recipe.with_overrides(Override(f"layers.{layer}.x", spec) for layer, spec in specs.items())
        measured = measure(alphas)
    return converted, ends, Quantization(recipe=recipe, statistics=measured)


def _float_mixer(mixer: Mixer, transforms: Transforms) -> Mixer:
    """A layer that stays float; in a rotated residual stream its ends turn with it."""
    if not transforms.rotate_u:
        mixer.transforms = Transforms()
        return mixer
    turned = fold(mixer.tensors(), Transforms(rotate_u=True))
    return Mixer(mixer.config, {name: tensor.to(mixer.config.dtype) for name, tensor in turned.items()})


@torch.no_grad()
def _filled_ends(
    *, model: nn.Module, adapter: Adapter, recipe: Recipe, alphas: dict[str, Tensor], head_divisor: Tensor | None
) -> dict[str, nn.Module]:
    ends = empty_ends(adapter, model, recipe)
    embedding: Any = model.get_submodule(adapter.embedding(model))
    head: Any = model.get_submodule(adapter.head(model))
    table, head_weight = embedding.weight, head.weight
    if recipe.rotates_residual:
        gamma: Any = model.get_submodule(adapter.final_norm(model)).weight
        turn = Transforms(rotate_u=True)
        width = table.shape[1]
        table = turn.to_u(table, table.to(torch.float32))
        head_weight = turn.to_u(head_weight, head_weight.to(torch.float32) * gamma.to(torch.float32))
        for name, weight in ((adapter.embedding(model), table), (adapter.head(model), head_weight)):
            if name not in ends:
                ends[name] = _float_end(model.get_submodule(name), weight.to(adapter.dtype(model)), width=width)
    scale = calibration.head_scale(alphas, head_divisor)
    quantized_table, quantized_head = ends.get(adapter.embedding(model)), ends.get(adapter.head(model))
    tied = isinstance(quantized_head, QuantizedHead) and quantized_head.table is quantized_table
    if isinstance(quantized_table, QuantizedEmbedding):
        quantized_table.fill(table, columns=scale if tied and head_divisor is not None else None)
    if isinstance(quantized_head, QuantizedHead):
        quantized_head.fill(None if tied else head_weight, bias=head.bias, input_scale=scale)
    return ends


def _float_end(original: Any, weight: Tensor, *, width: int) -> nn.Module:
    """A float embedding or head with another weight, apart from the one it was tied to."""
    if isinstance(original, nn.Embedding):
        return nn.Embedding(weight.shape[0], width, _weight=weight).requires_grad_(False)
    linear = nn.Linear(width, weight.shape[0], bias=original.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if original.bias is not None:
        linear.bias = nn.Parameter(original.bias.detach(), requires_grad=False)
    return linear


@torch.no_grad()
def _commit(
    *,
    model: nn.Module,
    adapter: Adapter,
    converted: dict[int, AnyMixer],
    ends: dict[str, nn.Module],
    recipe: Recipe,
) -> None:
    """Swap the new modules in."""
    for layer, mixer in converted.items():
        adapter.shell_at(model, layer).mixer = mixer
    for name, module in ends.items():
        swap(model, name, module)
    if recipe.rotates_residual:
        norm: Any = model.get_submodule(adapter.final_norm(model))
        norm.weight.fill_(1.0)
        adapter.rotate_rest(model)
        adapter.untie(model)
    adapter.after_install(model)
    model.eval()
