"""A model with one quantized tensor.

The tensor is quantized as the recipe says, in the recipe's coordinates: g rotated where the recipe rotates it, the
weights with rotations and smoothing folded in. (One thing of a recipe is not seen: where x has a scale per channel,
that scale is in the columns of x_proj, and x_proj is quantized here without it.) y, the scan's output before the
gate, is no site of a recipe, because the ops gate it before it leaves; it is quantized here with one absmax scale.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quamba import numerics
from quamba.analysis.study import Study
from quamba.analysis.tap import QuantizedScanOutput
from quamba.calibration import head_scale
from quamba.convert import fill_mixer, simulate_mixer
from quamba.nn.ends import QuantizedEmbedding, QuantizedHead
from quamba.nn.quantized_mixer import QuantizedMixer
from quamba.recipe import BLOCK_ACTIVATIONS, BLOCK_WEIGHTS, MODEL_ADDRESSES, BlockFormat, QuantSpec

BLOCK_TENSORS = (*BLOCK_ACTIVATIONS[:-1], "y", "g", *BLOCK_WEIGHTS)
TENSORS = (*BLOCK_TENSORS, *MODEL_ADDRESSES)
# Which steps of a recipe change what a tensor is quantized as; the others are of no consequence to it.
_STEPS_OF = {
    **dict.fromkeys(("u", "in_proj"), ("smooth_input",)),
    **dict.fromkeys(("x", "x_proj"), ("rotate_x",)),
    **dict.fromkeys(("g", "out_proj"), ("smooth_output", "rotate_output")),
}


def quantized_alike(study: Study, other: Study, name: str) -> bool:
    """Whether two recipes on one model do the same to one tensor of TENSORS, if it is the only one they quantize."""
    if name == "y":
        return True
    ones, others = study.recipe, other.recipe
    if name in MODEL_ADDRESSES:
        smoothing = name != "head.input" or ones.head_smoothing == others.head_smoothing
        return ones.spec(name) == others.spec(name) and smoothing
    for layer in study.opened.layers:
        mine, theirs = ones.block(layer), others.block(layer)
        if _spec(mine, name) != _spec(theirs, name):
            return False
        if any(mine.step(step) != theirs.step(step) for step in _STEPS_OF.get(name, ())):
            return False
    return True


def single_tensor_format(format: BlockFormat, name: str) -> BlockFormat | None:
    """The block's format with one tensor quantized and all steps kept; None where the format keeps it in float."""
    if _spec(format, name) is None:
        return None

    def alone(specs: Mapping[str, QuantSpec | None]) -> dict[str, QuantSpec | None]:
        return {key: spec if key == name else None for key, spec in specs.items()}

    return BlockFormat(activations=alone(format.activations), weights=alone(format.weights), steps=format.steps)


@torch.no_grad()
def single_tensor_mixer(study: Study, layer: int, name: str) -> nn.Module | None:
    """The layer's mixer with one tensor of BLOCK_TENSORS quantized; None where the recipe keeps it in float."""
    source = study.opened.mixers[layer]
    if name == "y":
        return QuantizedScanOutput(source, numerics.scale_from_alpha(study.y_alphas[layer]))
    format = single_tensor_format(study.recipe.block(layer), name)
    if format is None:
        return None
    prefix = f"layers.{layer}."
    alphas = {a.removeprefix(prefix): alpha for a, alpha in study.alphas.items() if a.startswith(prefix)}
    transforms = study.transforms[layer]
    if format.simulated:
        return simulate_mixer(source, format, transforms=transforms, alphas=alphas)
    return fill_mixer(QuantizedMixer(source.config, format), source, transforms=transforms, alphas=alphas)


class _QuantizedInput(nn.Module):
    """A float head behind the quantization of what it reads; scale None finds one per token."""

    def __init__(self, head: nn.Module, scale: Tensor | None) -> None:
        super().__init__()
        self.head = head
        self.scale = scale

    @property
    def weight(self) -> Tensor:
        """The head's, for code that asks for its dtype."""
        weight: Any = self.head.weight
        return weight  # type: ignore[no-any-return]

    def forward(self, hidden: Tensor) -> Any:
        scale = numerics.token_scale(hidden) if self.scale is None else self.scale
        return self.head(numerics.dequantize(numerics.quantize(hidden, scale), scale, hidden.dtype))


def single_tensor_end(study: Study, name: str) -> dict[str, nn.Module]:
    """Module name -> the embedding or head with one tensor quantized; empty where the recipe keeps it in float."""
    model, adapter = study.opened.model, study.opened.adapter
    spec = study.recipe.spec(name)
    if spec is None or (name == "head.input" and study.recipe.spec("head.weight") is None):
        return {}
    module_name = adapter.embedding(model) if name == "embedding" else adapter.head(model)
    original: Any = model.get_submodule(module_name)
    if name == "head.input":
        return {module_name: _QuantizedInput(original, head_scale(study.alphas, study.head_divisor))}
    rows, width = original.weight.shape
    dtype = adapter.dtype(model)
    if name == "embedding":
        table = QuantizedEmbedding(rows=rows, width=width, spec=spec, dtype=dtype)
        table.fill(original.weight)
        return {module_name: table}
    head = QuantizedHead(
        rows=rows, width=width, bias=original.bias is not None, spec=spec, input_spec=None, dtype=dtype
    )
    head.fill(original.weight, bias=original.bias, input_scale=None)
    return {module_name: head}


def _spec(format: BlockFormat, name: str) -> QuantSpec | None:
    return format.activations[name] if name in format.activations else format.weights[name]
