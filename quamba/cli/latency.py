"""TTFT and TPOT for `quamba compare`, by quamba.bench."""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn

from quamba.eval.comparing import Latency
from quamba.nn.quantized_mixer import QuantizedMixer

PROMPT = 512


def latency_on(device: str) -> Latency | None:
    """What measures a model there; None but on a GPU, whose times are what users wait for."""
    on_gpu = torch.device(device).type == "cuda" and find_spec("quamba.bench") is not None
    return latency if on_gpu else None


def latency(model: nn.Module) -> dict[str, float]:
    """Medians in milliseconds, batch 1: a prompt of PROMPT tokens, and a step; nothing for a model in float.

    Graphs are used where quamba.runtime has them for the model.
    """
    if not any(isinstance(module, QuantizedMixer) for module in model.modules()):
        return {}
    bench, subjects, timing = (import_module(f"quamba.bench{name}") for name in ("", ".subjects", ".timing"))
    subject = subjects.Quantized("quamba", model)
    report = bench.measure(
        model="", recipe=None, dtype=torch.get_default_dtype(), subjects=[subject], batches=(1,), lengths=(PROMPT,),
        new_tokens=0, plan=timing.Plan(), kernels=0,
    )  # fmt: skip
    figures = [figure for figure in report.figures if figure.case.mode == subject.modes[0]]
    return {figure.case.what: float(figure.time.median) for figure in figures}
