"""What a model takes in a checkpoint, without writing one."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from quamba.checkpoint.layout import is_scale


def checkpoint_dtype(model: Any) -> torch.dtype:
    """The dtype of the checkpoint that a model of transformers came from, whatever it was loaded in."""
    found = AutoConfig.from_pretrained(model.name_or_path).dtype if model.name_or_path else None
    return found if isinstance(found, torch.dtype) else model.dtype


def weight_bytes(model: nn.Module, *, dtype: torch.dtype) -> int:
    """The bytes of a float or quantized model's tensors in a checkpoint whose float tensors have that dtype."""
    total, seen = 0, set()
    for name, tensor in model.state_dict().items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        free = tensor.is_floating_point() and not is_scale(name)
        total += tensor.numel() * (dtype.itemsize if free else tensor.element_size())
    return total
