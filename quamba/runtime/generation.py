"""`model.generate()` of a quantized transformers model: transformers' own loop over preallocated states and graphs.

transformers' generate() runs with a stand-in for the model: the same object to it, attributes, modules, class and all,
but for calling it. A call that starts sequences gets the states of an engine put into its cache; a call that goes on
with them by a token replays the engine's graph. Every other call is the model's own forward on that cache, which
sees the same states. So whatever generate() can do, it does, and the tokens are the same.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from quamba.models.cache import bind, bound, unbind, unused
from quamba.nn.config import MixerState
from quamba.runtime.engine import Engine
from quamba.runtime.owner import Owner, owner_of, why_eager

CACHE = "cache_params"
# Arguments of a call that the engine takes care of; any other that asks for something goes to the model's forward.
_KNOWN = {"input_ids", "attention_mask", "use_cache", "logits_to_keep", "return_dict", CACHE}


@dataclass
class _Output(ModelOutput):  # type: ignore[misc]
    logits: Tensor | None = None
    cache_params: Any = None


def generate(model: Any, *args: Any, **options: Any) -> Any:
    """What `model.generate` is for a quantized transformers model; arguments, results and tokens are transformers'.

    `quamba.runtime.describe(model)` says what runs.
    """
    owner = owner_of(model)
    reason = why_eager(model, owner.config)
    if reason is not None:
        owner.note(Counter({f"eager: {reason}": 1}))
        return type(model).generate(model, *args, **options)
    run = _Run(owner, model)
    model_class: Any = type(model)
    stand_in: Any = object.__new__(_stand_in_class(model_class))
    object.__setattr__(stand_in, "__dict__", model.__dict__)
    object.__setattr__(stand_in, "_run", run)
    found = None
    try:
        found = model_class.generate(stand_in, *args, **options)
        return found
    finally:
        # Tokens alone do not hold on to the cache.
        run.finish(unbinding=CACHE in options or not isinstance(found, Tensor))


class _StandIn:
    """Mixed into the model's class."""

    __slots__ = ("_run",)
    _run: "_Run"

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._run.call(args, options)

    def get_compiled_call(self, compile_config: Any) -> Any:
        """The compiled call is the model's own."""
        return self._run.model.get_compiled_call(compile_config)


@cache
def _stand_in_class(model_class: type[PreTrainedModel]) -> type:
    return type(model_class.__name__, (_StandIn, model_class), {"__slots__": (), "__module__": model_class.__module__})


class _Run:
    """One generate(): takes an engine when the first prompt comes, gives it back at the end."""

    def __init__(self, owner: Owner, model: Any) -> None:
        self.owner = owner
        self.model = model
        self.ran: Counter[str] = Counter()
        self._engine: Engine | None = None
        self._cache: Any = None
        self._states: Mapping[int, MixerState] = {}

    def call(self, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """One call of the model."""
        ids: Any = options.get("input_ids")
        kept = options.get(CACHE)
        reason = self._unknown(args, options)
        if reason is None and self._cache is None:
            reason = self._start(kept, ids)
        if reason is None and kept is not self._cache:
            reason = "another cache than that of the prompt"
        if reason is None and not bound(kept, self._states):
            reason = "the cache was reordered or replaced (beam search)"
        if reason is None:
            logits = self._logits(ids, options.get("attention_mask"))
            if logits is not None:
                # A copy: the next replay overwrites the engine's.
                return _Output(logits=logits[:, None].clone(), cache_params=kept)
            self.ran["prefill eager"] += 1
        else:
            self.ran[f"eager: {reason}"] += 1
        return self.model(*args, **options)

    def _unknown(self, args: tuple[Any, ...], options: dict[str, Any]) -> str | None:
        """What the engine does not do."""
        asked = [
            name for name, value in options.items() if name not in _KNOWN and value is not None and value is not False
        ]
        if args or asked:
            return f"{', '.join(asked) or 'positional arguments'} in the call"
        if self.model.config.output_hidden_states:
            return "config.output_hidden_states"
        if not isinstance(options.get("input_ids"), Tensor) or options.get(CACHE) is None:
            return "no input_ids, or no cache (use_cache=False)"
        if (
            options.get("use_cache") is False
            or options.get("return_dict") is False
            or options.get("logits_to_keep") != 1
        ):
            return "use_cache, return_dict or logits_to_keep in the call"
        return None

    def _start(self, kept: Any, ids: Tensor) -> str | None:
        """Put an engine's states into an unused cache; why not, else."""
        engine = self.owner.take(self.model, ids.shape[0])
        states = dict(zip(engine.program.layers, engine.states.first(ids.shape[0]), strict=True))
        if ids.device != engine.device or not all(unused(kept, layer) for layer in states):
            self.owner.give_back(engine)
            return "a cache that was in use before, or records the past"
        with engine.running():
            engine.states.zero(ids.shape[0])
        for layer, state in states.items():
            bind(kept, layer, state)
        self._engine, self._cache, self._states = engine, kept, states
        return None

    def _logits(self, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """(B, V) by a graph (or a step on the engine's states); None for a prompt that no graph serves."""
        engine = self._engine
        assert engine is not None
        started = self._cache.layers[next(iter(self._states))].has_previous_state[0]
        if started:
            if ids.shape[1] != 1 or mask is not None:
                return None
            self.ran["decode graph" if engine.has_graphs else "decode on preallocated states"] += 1
            return engine.decode(ids[:, 0])
        logits = engine.prefill_graph(ids, mask)
        if logits is not None:
            self.ran["prefill graph"] += 1
            for layer in self._states:
                self._cache.layers[layer].has_previous_state[0] = True
        return logits

    def finish(self, *, unbinding: bool) -> None:
        """The cache, if somebody may still have it, gets states of its own; the engine goes back."""
        if self._engine is not None:
            if unbinding and bound(self._cache, self._states):
                with torch.no_grad():
                    for layer in self._states:
                        unbind(self._cache, layer)
            self.owner.give_back(self._engine)
        self.owner.note(self.ran)
