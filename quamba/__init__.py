"""Post-training INT8 quantization of selective state space models: Mamba, Falcon-Mamba, Jamba."""

# Importing quamba.hf registers our checkpoints with transformers' from_pretrained.
from quamba import hf
from quamba.checkpoint import load
from quamba.quantize import quantize
from quamba.recipe import Override, QuantSpec, Recipe, Step
from quamba.recipes import RECIPES

__all__ = ["RECIPES", "Override", "QuantSpec", "Recipe", "Step", "hf", "load", "quantize"]
__version__ = "0.1.0"
