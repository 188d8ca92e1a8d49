"""How long a model's first and next tokens take, for a comparison of recipes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from quamba.bench.load import Others, disturbed
from quamba.bench.subjects import Quantized
from quamba.bench.timing import Plan, Spread, time_in_turn
from quamba.errors import SizeError
from quamba.eval.provenance import hardware
from quamba.ops import cuda, native

TTFT, TPOT = "TTFT", "TPOT"


@dataclass(frozen=True)
class LatencySettings:
    """What is timed: so many prompts of so many tokens at once, and a step of as many sequences; and how often."""

    prompt: int = 512
    batch: int = 1
    plan: Plan = field(default_factory=Plan)

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.batch < 1:
            raise SizeError(
                f"found {self.batch} prompts of {self.prompt} tokens to time; expected at least one of each"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Latency:
    """What one model takes.

    Attributes:
        times: of TTFT and TPOT, in milliseconds.
        prompt, batch: tokens of a prompt, and sequences.
        mode: "graph" or "eager": how it ran, the faster way that there is.
        others: the share of the CPU's cores that other processes kept busy meanwhile; None where unknown.
        disturbed: True for times that are not to be published, of a CPU that others used.
    """

    times: Mapping[str, Spread]
    prompt: int
    batch: int
    mode: str
    others: float | None
    disturbed: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**vars(self), "times": {name: time.to_dict() for name, time in self.times.items()}}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Latency":
        """Inverse of `to_dict`. Raises KeyError or TypeError on anything else."""
        return cls(**{**content, "times": {name: Spread(**time) for name, time in content["times"].items()}})


def measure_latency(model: nn.Module, settings: LatencySettings) -> Latency:
    """Time a model that quamba.quantize has been through, by quamba.runtime.

    Raises:
        UnsupportedModelError: it has not, or with a recipe that simulates its bits.
    """
    subject, others = Quantized("", model), Others()
    mode = subject.modes[0]
    calls = {
        TTFT: subject.prefill(settings.batch, settings.prompt, mode),
        TPOT: subject.decode(settings.batch, mode),
    }
    times = time_in_turn(calls, settings.plan, subject.device)
    share = others.share()
    return Latency(
        times=times,
        prompt=settings.prompt,
        batch=settings.batch,
        mode=mode,
        others=share,
        disturbed=disturbed(share, subject.device.type),
    )


def timed_on(device: torch.device) -> dict[str, str]:
    """The device and the ops on it: times of others are not comparable."""
    ops = (cuda.MISSING or "compiled kernels") if device.type == "cuda" else native.description()
    return {"hardware": hardware(device), "ops": ops}
