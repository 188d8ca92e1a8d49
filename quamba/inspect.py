"""What a model is made of: its quantized sites, the size of its parts, and what is float and why."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from quamba.models.adapter import Adapter, find_adapter, model_type_of
from quamba.nn.quantized_mixer import QuantizedMixer
from quamba.quantization import Quantization
from quamba.recipe import BLOCK_ACTIVATIONS, BLOCK_WEIGHTS, MODEL_ADDRESSES, Recipe

SMALL = "small tensors of the blocks (norms, biases, A, D): read in float by the ops"


@dataclass(frozen=True)
class Site:
    """One quantized activation.

    Attributes:
        address: "layers.<i>.<site>" or "head.input".
        granularity: "tensor", "channel" or "token".
        scale_min, scale_max: of its static scales, equal for one scale; None per token, found at run time.
        alpha, clipped, sqnr_db: as in quamba.quantization.SiteStatistics; None where nothing was measured.
    """

    address: str
    granularity: str
    scale_min: float | None
    scale_max: float | None
    alpha: float | None
    clipped: float | None
    sqnr_db: float | None


@dataclass(frozen=True)
class Part:
    """One part of the model, in bytes of memory: int8 values, scales, and everything else."""

    name: str
    int8: int
    scales: int
    other: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.int8 + self.scales + self.other


@dataclass(frozen=True)
class KeptFloat:
    """Something that is not quantized: its name ("*" for every layer), why, and the bytes of its tensors, if any."""

    name: str
    reason: str
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` found; `recipe` is None for a model that is not quantized."""

    model_type: str
    recipe: str | None
    sites: tuple[Site, ...]
    parts: tuple[Part, ...]
    kept_float: tuple[KeptFloat, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def inspect_model(model: nn.Module) -> Inspection:
    """Look at a float or quantized model.

    Raises:
        UnsupportedModelError: quamba does not know the model.
    """
    adapter = find_adapter(model)
    quantization: Quantization | None = getattr(model, "quantization", None)
    return Inspection(
        model_type=model_type_of(model),
        recipe=None if quantization is None else quantization.recipe.label,
        sites=() if quantization is None else tuple(_sites(adapter, model, quantization)),
        parts=tuple(_parts(adapter, model)),
        kept_float=tuple(_kept_float(adapter, model, None if quantization is None else quantization.recipe)),
    )


def _sites(adapter: Adapter, model: nn.Module, quantization: Quantization) -> Iterator[Site]:
    recipe = quantization.recipe
    scales: dict[str, Tensor | None] = {}
    for layer in adapter.layers(model):
        mixer = adapter.shell_at(model, layer).mixer
        for site in BLOCK_ACTIVATIONS:
            scales[f"layers.{layer}.{site}"] = getattr(mixer, f"{site}_scale", None)
    scales["head.input"] = getattr(model.get_submodule(adapter.head(model)), "input_scale", None)
    for address, scale in scales.items():
        spec = recipe.spec(address)
        # A head in float has no use for the spec of its input.
        if spec is None or (address == "head.input" and recipe.spec("head.weight") is None):
            continue
        statistics = quantization.statistics.get(address)
        yield Site(
            address=address,
            granularity=spec.granularity,
            scale_min=None if scale is None else float(scale.min()),
            scale_max=None if scale is None else float(scale.max()),
            alpha=None if statistics is None else statistics.alpha,
            clipped=None if statistics is None else statistics.clipped,
            sqnr_db=None if statistics is None else statistics.sqnr_db,
        )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the state once: of tied ones the first."""
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        key = (tensor.data_ptr(), tensor.numel(), tensor.dtype)
        if tensor.numel() and key not in seen:
            seen.add(key)
            yield name, tensor


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _kind(name: str, tensor: Tensor) -> str:
    if not tensor.is_floating_point():
        return "int8"
    return "scales" if name.endswith(("_scale", ".g_divisor")) else "other"


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _over_layers(name: str) -> str:
    """ "model.layers.3.feed_forward" -> "model.layers.*.feed_forward"."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _blocks(adapter: Adapter, model: nn.Module) -> list[str]:
    return [name for i in adapter.layers(model) for name in (adapter.module_name(i), *adapter.absorbed(i))]


def _parts(adapter: Adapter, model: nn.Module) -> Iterator[Part]:
    groups: list[tuple[str, str]] = [
        (adapter.embedding(model), "embedding"),
        *((name, "Mamba blocks") for name in _blocks(adapter, model)),
        *((name, _over_layers(name)) for name in adapter.kept_float(model)),
        (adapter.head(model), "head"),
    ]
    sizes: dict[str, dict[str, int]] = {part: dict.fromkeys(("int8", "scales", "other"), 0) for _, part in groups}
    for name, tensor in _tensors(model):
        part = next((part for module, part in groups if _inside(name, module)), "other")
        size = sizes.setdefault(part, dict.fromkeys(("int8", "scales", "other"), 0))
        size[_kind(name, tensor)] += _bytes(tensor)
    for part, size in sizes.items():
        yield Part(name=part, **size)


def _kept_float(adapter: Adapter, model: nn.Module, recipe: Recipe | None) -> Iterator[KeptFloat]:
    tensors = [(name, _bytes(tensor)) for name, tensor in _tensors(model) if tensor.is_floating_point()]
    if recipe is None:
        yield KeptFloat(name="*", reason="the model is not quantized", bytes=sum(size for _, size in tensors))
        return
    always: dict[tuple[str, str], int] = {}
    for module, reason in adapter.kept_float(model).items():
        key = (_over_layers(module), reason)
        always[key] = always.get(key, 0) + sum(size for name, size in tensors if _inside(name, module))
    for (name, reason), size in always.items():
        yield KeptFloat(name=name, reason=reason, bytes=size)
    yield from _by_recipe(adapter, model, recipe, dict(tensors))
    small = 0
    for layer in adapter.layers(model):
        if isinstance(adapter.shell_at(model, layer).mixer, QuantizedMixer):
            block = adapter.module_name(layer)
            for name, size in tensors:
                weight = name.rpartition(".")[0].rpartition(".")[2] in BLOCK_WEIGHTS and name.endswith(".weight")
                own = (
                    _inside(name, block) and not weight and not name.endswith((".conv_weight", "_scale", ".g_divisor"))
                )
                small += size if own else 0
    if small:
        yield KeptFloat(name="blocks", reason=SMALL, bytes=small)


def _by_recipe(adapter: Adapter, model: nn.Module, recipe: Recipe, tensors: dict[str, int]) -> Iterator[KeptFloat]:
    """What the recipe or its overrides leave in float; layers are put together where all of them agree."""
    layers = adapter.layers(model)
    whole = [layer for layer in layers if recipe.block(layer).is_float]

    def reason(address: str) -> str:
        patterns = [override.pattern for override in recipe.overrides if override.matches(address)]
        return f"kept by the override {patterns[-1]!r}" if patterns else f"the recipe {recipe.name!r} keeps it"

    def size(layer: int, weight: str) -> int:
        mixer = f"{adapter.module_name(layer)}.mixer"
        return tensors.get(f"{mixer}.conv_weight" if weight == "conv" else f"{mixer}.{weight}.weight", 0)

    def inside(module: str) -> int:
        return sum(bytes for name, bytes in tensors.items() if _inside(name, module))

    if whole == layers:
        yield KeptFloat("layers.*", reason("layers.*.u"), sum(inside(adapter.module_name(i)) for i in layers))
    else:
        for layer in whole:
            yield KeptFloat(f"layers.{layer}", reason(f"layers.{layer}.u"), inside(adapter.module_name(layer)))
    rest = [layer for layer in layers if layer not in whole]
    for part in (*BLOCK_ACTIVATIONS, *BLOCK_WEIGHTS):
        found = [layer for layer in rest if recipe.spec(f"layers.{layer}.{part}") is None]
        reasons = {reason(f"layers.{layer}.{part}") for layer in found}
        if found == rest and len(reasons) == 1:
            yield KeptFloat(f"layers.*.{part}", reasons.pop(), sum(size(layer, part) for layer in found))
            continue
        for layer in found:
            yield KeptFloat(f"layers.{layer}.{part}", reason(f"layers.{layer}.{part}"), size(layer, part))
    ends = {"head.weight": adapter.head(model), "embedding": adapter.embedding(model)}
    for address in MODEL_ADDRESSES:
        if recipe.spec(address) is None:
            yield KeptFloat(address, reason(address), inside(ends[address]) if address in ends else 0)
