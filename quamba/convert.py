"""From float to quantized: the empty skeleton of a quantized model, and the values that fill it.

There is one way to make a quantized module: empty, from a config and a recipe, then filled, from a float module
here or from a checkpoint (quamba.checkpoint).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quamba import numerics
from quamba.errors import CalibrationError, RecipeError
from quamba.models.adapter import Adapter
from quamba.nn.config import BlockConfig
from quamba.nn.ends import QuantizedEmbedding, QuantizedHead
from quamba.nn.mixer import Mixer
from quamba.nn.named import swap
from quamba.nn.quantized_mixer import QuantizedMixer
from quamba.nn.simulated_mixer import SimulatedMixer
from quamba.recipe import BlockFormat, Recipe
from quamba.transforms import Transforms, fold


def empty_mixer(adapter: Adapter, model: nn.Module, layer: int, recipe: Recipe) -> Mixer | QuantizedMixer:
    """The mixer that the recipe wants for one layer, on the meta device; float where it quantizes nothing."""
    config = adapter.config(model, layer)
    format = recipe.block(layer)
    return Mixer.empty(config) if format.is_float else QuantizedMixer(config, format)


def empty_ends(adapter: Adapter, model: nn.Module, recipe: Recipe) -> dict[str, nn.Module]:
    """The quantized embedding and head that the recipe wants, by module name, on the meta device."""
    ends: dict[str, nn.Module] = {}
    embedding, head = adapter.embedding(model), adapter.head(model)
    table_spec, head_spec = recipe.spec("embedding"), recipe.spec("head.weight")
    dtype = adapter.dtype(model)
    # mamba-had turns the head apart from the embedding: the final norm's weight goes into the head alone.
    tied = adapter.tied(model) and table_spec == head_spec and not recipe.rotates_residual
    smooth = recipe.head_smoothing is not None
    if table_spec is not None:
        weight = model.get_submodule(embedding).weight
        assert isinstance(weight, Tensor)
        ends[embedding] = QuantizedEmbedding(
            rows=weight.shape[0], width=weight.shape[1], spec=table_spec, dtype=dtype, columns=tied and smooth
        )
    if head_spec is not None:
        linear = model.get_submodule(head)
        weight = linear.weight
        assert isinstance(weight, Tensor)
        table = ends.get(embedding)
        ends[head] = QuantizedHead(
            rows=weight.shape[0],
            width=weight.shape[1],
            bias=getattr(linear, "bias", None) is not None,
            spec=head_spec,
            input_spec=recipe.spec("head.input"),
            dtype=dtype,
            smooth=smooth,
            tied=table if tied and isinstance(table, QuantizedEmbedding) else None,
        )
    return ends


def build_skeleton(adapter: Adapter, model: nn.Module, recipe: Recipe) -> None:
    """Turn a float model (on meta, say) into the recipe's empty quantized one, in place.

    Raises:
        RecipeError: an override matches nothing in this model, or the recipe is a simulation.
    """
    if recipe.simulated:
        raise RecipeError(
            f"found the recipe {recipe.label!r}, which rounds to fewer bits in float; expected one of int8 values"
        )
    recipe.check(adapter.layers(model))
    ends = empty_ends(adapter, model, recipe)
    for layer in adapter.layers(model):
        adapter.install(model, layer, empty_mixer(adapter, model, layer, recipe))
    for name, module in ends.items():
        swap(model, name, module)
    adapter.after_install(model)


def finalize(model: nn.Module) -> None:
    """Derive what the ops read, in every quantized mixer and head; call it once the buffers are filled."""
    for module in model.modules():
        if isinstance(module, (QuantizedMixer, QuantizedHead)):
            module.finalize()


@torch.no_grad()
def fill_mixer(
    target: QuantizedMixer, source: Mixer, *, transforms: Transforms, alphas: Mapping[str, Tensor]
) -> QuantizedMixer:
    """Fill an empty quantized mixer from a float one.

    Args:
        target: the empty mixer.
        source: the float mixer, not folded.
        transforms: the coordinates in which the alphas were observed.
        alphas: clipping magnitude of every static site, of the shape of its scale.

    Raises:
        CalibrationError: a site has no statistic, or one of the wrong shape.
    """
    format = target.format
    tensors = fold(source.tensors(), transforms)
    for site, scale in _scales(target.config, format, alphas).items():
        setattr(target, f"{site}_scale", scale)
    if format.granularity("x") == "channel":
        tensors["x_proj.weight"] = tensors["x_proj.weight"].to(torch.float32) * target.x_scale
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        getattr(target, name).fill(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))
    conv = format.weights["conv"]
    if conv is None:
        target.conv_weight = tensors["conv.weight"].detach().clone()
    else:
        target.conv_qweight, target.conv_weight_scale = numerics.quantize_weight(
            tensors["conv.weight"], per_channel=conv.granularity == "channel"
        )
    for name in (
        "norm.weight",
        "conv.bias",
        "d_norm.weight",
        "B_norm.weight",
        "C_norm.weight",
        "dt_bias",
        "A_log",
        "D",
    ):
        if name in tensors:
            buffer = name.replace(".", "_")
            # A clone, so that the float model can be freed.
            setattr(target, buffer, tensors[name].detach().to(getattr(target, buffer).dtype, copy=True))
    if transforms.g_divisor is not None:
        target.g_divisor = transforms.g_divisor.detach().to(target.g_divisor.dtype)
    target.finalize()
    return target


def _scales(config: BlockConfig, format: BlockFormat, alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scale of every static site."""
    scales = {}
    for site, spec in format.activations.items():
        if spec is None or spec.granularity == "token":
            continue
        shape = config.scale_shape(site, per_channel=spec.granularity == "channel")
        if site not in alphas or tuple(alphas[site].shape) != shape:
            found = f"shape {tuple(alphas[site].shape)}" if site in alphas else "none"
            raise CalibrationError(f"found {found} for the statistic of site {site!r}; expected shape {shape}")
        scales[site] = numerics.scale_from_alpha(alphas[site], bits=spec.bits)
    return scales


@torch.no_grad()
def simulate_mixer(
    source: Mixer, format: BlockFormat, *, transforms: Transforms, alphas: Mapping[str, Tensor]
) -> SimulatedMixer:
    """A float mixer that rounds what a quantized one of that format would round.

    Args:
        source: the float mixer, not folded.
        format: with fewer bits than 8 somewhere.
        transforms, alphas: as for `fill_mixer`.

    Raises:
        CalibrationError: as for `fill_mixer`.
    """
    scales = _scales(source.config, format, alphas)
    tensors = {name: tensor.to(torch.float32) for name, tensor in fold(source.tensors(), transforms).items()}
    # A quantized mixer has the channel scales of x in the columns of x_proj before it quantizes them.
    columns = scales["x"] if format.granularity("x") == "channel" else torch.ones_like(tensors["D"])
    tensors["x_proj.weight"] = tensors["x_proj.weight"] * columns
    for name, spec in format.weights.items():
        if spec is not None:
            tensors[f"{name}.weight"] = numerics.simulate_weight(
                tensors[f"{name}.weight"], per_channel=spec.granularity == "channel", bits=spec.bits
            )
    tensors["x_proj.weight"] = tensors["x_proj.weight"] / columns
    return SimulatedMixer(source.config, tensors, format=format, transforms=transforms, scales=scales)


@torch.no_grad()
def refill_x(target: QuantizedMixer, source: Mixer, *, transforms: Transforms, alpha: Tensor) -> None:
    """Give a filled mixer another clip of x; arguments as for `fill_mixer`."""
    target.x_scale = numerics.scale_from_alpha(alpha).to(target.x_scale.device)
    if target.format.granularity("x") == "channel":
        weight = fold({"x_proj.weight": source.tensors()["x_proj.weight"]}, Transforms(rotate_x=transforms.rotate_x))
        target.x_proj.fill(weight["x_proj.weight"].to(torch.float32) * target.x_scale, None)
    target.finalize()
