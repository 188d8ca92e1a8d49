"""Tying a quantization to its model, so that it is saved with it."""

import os
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from quamba.checkpoint.saving import MAX_SHARD_SIZE, save
from quamba.errors import CheckpointError
from quamba.quantization import Quantization
from quamba.runtime.generation import generate

# What transformers' save_pretrained also takes, and the values with which that asks for nothing.
_NOTHING = {
    "state_dict": None,
    "push_to_hub": False,
    "variant": None,
    "token": None,
    "safe_serialization": True,
    "save_peft_format": True,
    "save_original_format": True,
    "distributed_checkpoint": False,
}


def attach(model: nn.Module, quantization: Quantization) -> None:
    """Say in the model how it was quantized: `model.quantization`, the config, a `save_pretrained` and, for
    transformers' models, a `generate` of ours.

    Args:
        model: holds our mixers.
        quantization: what was done to it.
    """
    # quamba.hf reads checkpoints, so it imports this package.
    from quamba.hf import adopt

    attributes: Any = model
    attributes.quantization = quantization
    # On the instance: the class belongs to others. A bound method, so that a deep copy saves itself.
    attributes.save_pretrained = MethodType(save_pretrained, model)
    if isinstance(model, PreTrainedModel):
        attributes.generate = MethodType(generate, model)
        adopt(model, quantization)


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    is_main_process: bool = True,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    **options: Any,
) -> None:
    """What `model.save_pretrained` is for a quantized model: quamba.checkpoint.save.

    Args:
        model: the model.
        save_directory: see `quamba.checkpoint.save`.
        is_main_process: False does nothing, for all processes but one of a distributed run.
        max_shard_size: see `quamba.checkpoint.save`.
        options: of transformers' save_pretrained; only values that ask for nothing are taken.

    Raises:
        CheckpointError: an option is not supported, or see `quamba.checkpoint.save`.
    """
    for name, value in options.items():
        if name not in _NOTHING or value != _NOTHING[name]:
            raise CheckpointError(
                f"found {name}={value!r} in save_pretrained; expected is_main_process and max_shard_size alone; "
                "to upload, call model.push_to_hub(...) instead"
            )
    if is_main_process:
        save(model, save_directory, max_shard_size=max_shard_size)
