"""Post-training INT8 quantization of selective state space models: Mamba, Falcon-Mamba, Jamba."""

from quamba.checkpoint import load
from quamba.quantize import quantize
from quamba.recipe import Override, QuantSpec, Recipe, Step
from quamba.recipes import RECIPES

__all__ = ["RECIPES", "Override", "QuantSpec", "Recipe", "Step", "load", "quantize"]
__version__ = "0.1.0"
