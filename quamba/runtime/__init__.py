"""Running quantized models: CUDA graphs behind `model.generate()`, and `Session` for loops of one's own."""

from torch import nn

from quamba.runtime.config import RuntimeConfig
from quamba.runtime.owner import Description, owner_of
from quamba.runtime.session import Session

__all__ = ["Description", "RuntimeConfig", "Session", "configure", "describe", "release"]


def configure(model: nn.Module, config: RuntimeConfig) -> None:
    """Set how `model.generate()` runs; what was captured before is dropped."""
    owner = owner_of(model)
    owner.config = config
    owner.release()


def describe(model: nn.Module) -> Description:
    """What `model.generate()` runs on, why, which graphs are captured, and what the last call ran; print it."""
    return owner_of(model).describe(model)


def release(model: nn.Module) -> None:
    """Free the states and graphs that `model.generate()` keeps for its next call."""
    owner_of(model).release()
