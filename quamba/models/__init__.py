"""Adapters: one file per family of models."""

from quamba.models import mamba_ssm, transformers_jamba, transformers_mamba
from quamba.models.adapter import ADAPTERS, Adapter, Shell, find_adapter, quantized_layers

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Shell",
    "find_adapter",
    "mamba_ssm",
    "quantized_layers",
    "transformers_jamba",
    "transformers_mamba",
]
