"""Checkpoints of quantized models: safetensors and config.json, as docs/checkpoint.md describes them."""

from quamba.checkpoint.attaching import attach
from quamba.checkpoint.loading import load
from quamba.checkpoint.saving import save

__all__ = ["attach", "load", "save"]
