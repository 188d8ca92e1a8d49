"""Latency, memory and bandwidth of quantized models, and of mamba-ssm's beside them: what `quamba bench` runs."""

from quamba.bench.measure import Report, measure
from quamba.bench.shapes import SHAPES, Shape, find_shape

__all__ = ["SHAPES", "Report", "Shape", "find_shape", "measure"]
