"""Models with random weights, made on the device: latency does not depend on the values."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from quamba.bench.shapes import Shape
from quamba.quantize import quantize
from quamba.recipe import Recipe

# Sequences and tokens of random calibration data.
_CALIBRATION = (2, 64)


@torch.no_grad()
def random_model(shape: Shape, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A float model with random weights, never on another device or in another dtype."""
    config = AutoConfig.for_model(shape.model_type, **shape.settings)
    factory: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model: nn.Module = factory.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    attributes: Any = model
    attributes.tie_weights()
    for buffer in model.buffers():
        buffer.fill_(1)
    for name, parameter in model.named_parameters():
        _fill(name, parameter)
    return model.eval()


def _fill(name: str, parameter: Tensor) -> None:
    if name.endswith("A_log"):
        parameter.copy_(torch.arange(1, parameter.shape[1] + 1, device=parameter.device).log().expand_as(parameter))
    elif name.endswith("dt_proj.bias"):
        parameter.fill_(-4.0)
    elif "norm" in name or name.endswith(".D"):
        parameter.fill_(1.0)
    elif parameter.dim() == 1:
        parameter.zero_()
    else:
        parameter.normal_(std=0.02)


def quantize_blindly(model: nn.Module, recipe: str | Recipe) -> nn.Module:
    """Quantize a model, in place, with random token ids for calibration data."""
    attributes: Any = model
    device = next(model.parameters()).device
    ids = torch.randint(attributes.config.vocab_size, _CALIBRATION, device=device)
    return quantize(model, [ids], recipe, progress=False)
