"""Adapters: one file per family of models. Every module here is imported, so that its adapters register."""

import importlib
import pkgutil

from quamba.models.adapter import ADAPTERS, Adapter, Shell, find_adapter, quantized_layers

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["ADAPTERS", "Adapter", "Shell", "find_adapter", "quantized_layers"]
