"""Loading a quantized model: config and headers are verified, then the empty model, then tensor after tensor."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from quamba.checkpoint.attaching import attach
from quamba.checkpoint.container import REMEDY
from quamba.checkpoint.directory import recover
from quamba.checkpoint.layout import CONFIG, GENERATION_CONFIG, is_scale, read_json
from quamba.checkpoint.manifest import Manifest
from quamba.checkpoint.skeleton import MAMBA_SSM, empty_skeleton
from quamba.errors import CheckpointError


def load(
    directory: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Any:
    """Load a quantized model that quamba saved; its logits are bit-equal to those of the saved model.

    Args:
        directory: a local directory.
        device: where the tensors go, one at a time; they are never all on the CPU for another device.
        dtype: of the tensors that are not quantized; None keeps the saved one. Scales are float32 always.

    Returns:
        The model, in evaluation mode; `model.quantization` says how it was made.

    Raises:
        CheckpointError: something is missing, damaged, mislabelled or of an unknown version.
    """
    directory = Path(directory)
    recover(directory)
    manifest = Manifest.read(directory)
    generation_config = _generation_config(directory)
    config = manifest.config
    skeleton = empty_skeleton(
        config, manifest.quantization.recipe, dtype=dtype or manifest.dtype, where=str(directory / CONFIG)
    )
    manifest.check(skeleton.expected(manifest.dtype), mixed=config["model_type"] == MAMBA_SSM)
    tensors = {name: tensor.to(device) for name, tensor in manifest.tensors()}
    if dtype is not None:
        tensors = {n: t.to(dtype) if t.is_floating_point() and not is_scale(n) else t for n, t in tensors.items()}
    tensors |= {name: tensors[source] for name, source in skeleton.ties.items()}
    nn.Module.load_state_dict(skeleton.model, tensors, assign=True)
    model = skeleton.finish()
    if isinstance(model, PreTrainedModel):
        model.name_or_path = model.config.name_or_path = str(directory)
        if generation_config is not None and model.can_generate():
            model.generation_config = generation_config
    attach(model, manifest.quantization)
    return model


def _generation_config(directory: Path) -> GenerationConfig | None:
    path = directory / GENERATION_CONFIG
    if not path.exists():
        return None
    content = read_json(path)
    try:
        return GenerationConfig.from_dict(content)
    # Whatever transformers raises on values that it does not take is an error of the checkpoint.
    except Exception as error:
        raise CheckpointError(f"{path}: found a malformed generation config ({error}); {REMEDY}") from error
