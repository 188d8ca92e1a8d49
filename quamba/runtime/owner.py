"""What the runtime keeps for one model: its settings, idle engines for generate(), and what ran last."""

import threading
import weakref
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from quamba import ops
from quamba.errors import UnsupportedModelError
from quamba.models.adapter import find_adapter
from quamba.runtime.config import RuntimeConfig
from quamba.runtime.engine import Engine
from quamba.runtime.program import Program


@dataclass(frozen=True)
class Description:
    """What `model.generate()` runs on.

    Attributes:
        mode: "CUDA graphs", "preallocated states" (the same without graphs), or "eager" (transformers' own loop and
            cache alone).
        because: what decided.
        captured: the graphs that are kept: ("decode", B), ("prefill", B, padded L).
        state_bytes: memory that idle engines hold.
        last: how many forward passes of the last generate() ran how; those that did not go through the runtime
            although it could serve the model say why: {"decode graph": 63, "prefill eager": 1, "eager: ...": 2}.
    """

    mode: str
    because: str
    captured: tuple[Hashable, ...]
    state_bytes: int
    last: dict[str, int]

    def __str__(self) -> str:
        lines = [f"generate() runs on {self.mode}: {self.because}"]
        if self.captured:
            lines.append(f"captured: {', '.join(map(str, self.captured))}")
        if self.state_bytes:
            lines.append(f"states kept: {self.state_bytes / 1e6:.1f} MB")
        if self.last:
            lines.append("last generate(): " + ", ".join(f"{count} x {name}" for name, count in self.last.items()))
        return "\n".join(lines)


class Owner:
    """The runtime's side of one model; it does not keep the model alive."""

    def __init__(self) -> None:
        self.config = RuntimeConfig()
        self.last: dict[str, int] = {}
        self._idle: list[Engine] = []
        self._lock = threading.Lock()

    def take(self, model: nn.Module, batch: int) -> Engine:
        """An engine with at least that many slots, for one generate() alone."""
        with self._lock:
            fitting = sorted((e for e in self._idle if e.slots >= batch), key=lambda engine: engine.slots)
            for engine in fitting:
                self._idle.remove(engine)
                if engine.serves(model):
                    return engine
            config = self.config
        return Engine(model, batch, config)

    def give_back(self, engine: Engine) -> None:
        """Keep an engine for the next generate(), as far as the settings allow."""
        with self._lock:
            if engine.config == self.config:
                self._idle.append(engine)
            # The oldest goes first.
            del self._idle[: max(0, len(self._idle) - self.config.idle_sessions)]

    def release(self) -> None:
        """Let go of all idle engines."""
        with self._lock:
            self._idle.clear()

    def describe(self, model: nn.Module) -> Description:
        """What generate() of this model runs on."""
        reason = why_eager(model, self.config)
        mode, because = "eager", reason or ""
        if reason is None:
            device = Program(model).device.type
            graphs = device == "cuda" and self.config.graphs
            mode = "CUDA graphs" if graphs else "preallocated states"
            because = f"a stack of Mamba blocks on {device}"
            if not graphs:
                because += "; RuntimeConfig(graphs=False)" if not self.config.graphs else ", which has no graphs"
        with self._lock:
            captured = tuple(key for engine in self._idle for key in engine.captured())
            return Description(
                mode=mode,
                because=because,
                captured=captured,
                state_bytes=sum(engine.states.bytes for engine in self._idle),
                last=dict(self.last),
            )

    def note(self, ran: Counter[str]) -> None:
        """Remember what a generate() ran."""
        self.last = dict(ran)


_OWNERS: "weakref.WeakKeyDictionary[nn.Module, Owner]" = weakref.WeakKeyDictionary()
_OWNERS_LOCK = threading.Lock()


def owner_of(model: nn.Module) -> Owner:
    """The model's Owner, made on first use; a copy of a model has its own."""
    with _OWNERS_LOCK:
        found = _OWNERS.get(model)
        if found is None:
            found = _OWNERS[model] = Owner()
        return found


def why_eager(model: nn.Module, config: RuntimeConfig) -> str | None:
    """Why generate() of a model runs in transformers' own loop alone; None where the runtime serves it."""
    try:
        tail = find_adapter(model).tail(model)
    except UnsupportedModelError as error:
        return str(error)
    if tail is None:
        return "the model has attention layers besides its Mamba blocks"
    device = next(t.device for t in (*model.parameters(), *model.buffers())).type
    if device not in config.generate_on:
        return f"the model is on {device}, RuntimeConfig.generate_on is {config.generate_on}"
    if ops.references_forced():
        return "inside `with quamba.ops.reference()`"
    if "forward" in vars(model) or hasattr(model, "_hf_hook"):
        return "the model's forward was replaced on the instance (accelerate does so to dispatch it)"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "there are global forward hooks, which a graph would pass by"
    hooked = next((name for name, module in model.named_modules() if _is_hooked(module)), None)
    return None if hooked is None else f"there is a forward hook on {hooked!r}, which a graph would pass by"


def _is_hooked(module: nn.Module) -> Any:
    return module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
