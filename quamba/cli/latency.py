"""TTFT and TPOT for `quamba compare`, by quamba.bench."""

import torch
from torch import nn

from quamba.bench import measure
from quamba.bench.subjects import Quantized
from quamba.bench.timing import Plan
from quamba.eval.comparing import Latency
from quamba.nn.quantized_mixer import QuantizedMixer

PROMPT = 512


def latency_on(device: str) -> Latency | None:
    """What measures a model there; None but on a GPU, whose times are what users wait for."""
    return latency if torch.device(device).type == "cuda" else None


def latency(model: nn.Module) -> dict[str, float]:
    """Medians in milliseconds, batch 1: a prompt of PROMPT tokens, and a step; nothing for a model in float.

    Graphs are used where quamba.runtime has them for the model.
    """
    if not any(isinstance(module, QuantizedMixer) for module in model.modules()):
        return {}
    subject = Quantized("quamba", model)
    report = measure(
        model="", recipe=None, dtype=torch.get_default_dtype(), subjects=[subject], batches=(1,), lengths=(PROMPT,),
        new_tokens=0, plan=Plan(), kernels=0,
    )  # fmt: skip
    return {figure.case.what: figure.time.median for figure in report.figures if figure.case.mode == subject.modes[0]}
