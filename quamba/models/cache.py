"""Our recurrent state inside transformers' caches (transformers 5.17 to 5.23 keep the same layer fields)."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quamba import ops
from quamba.errors import UnsupportedModelError
from quamba.models.adapter import AnyMixer
from quamba.nn.config import MixerState
from quamba.ops.cache import Derived


@dataclass
class _Ahead:
    """States that were made for layers of a cache before these asked.

    Attributes:
        kind: batch, shape of a layer, dtype and device.
        none: a state of no sequences of that kind.
        states: by layer.
    """

    kind: tuple[Any, ...]
    none: MixerState
    states: dict[int, MixerState]


_ahead: "weakref.WeakKeyDictionary[Any, _Ahead]" = weakref.WeakKeyDictionary()
# A model hands the same mask to every layer.
_as_bool: Derived[Tensor] = Derived(lambda mask: mask.to(torch.bool))


def state_of(cache: Any, layer: int, mixer: AnyMixer, hidden: Tensor) -> MixerState | None:
    """The state of one layer in a transformers cache, made on first use; None without a cache.

    Args:
        cache: a transformers Cache whose layers hold linear-attention states, or None.
        layer: the layer's number.
        mixer: says the dtypes of the state.
        hidden: (B, L, E), for the batch size and the device.

    Raises:
        UnsupportedModelError: the cache has no such states, or is asked to record the past (assisted decoding).
    """
    if cache is None:
        return None
    entries = getattr(cache, "layers", ())
    entry: Any = entries[layer] if layer < len(entries) else None
    if not hasattr(entry, "conv_states"):
        found = type(cache).__name__ if entry is None else f"a cache layer of type {type(entry).__name__}"
        raise UnsupportedModelError(
            f"found {found} for Mamba layer {layer}; expected a layer with conv_states and recurrent_states "
            "(DynamicCache(config=model.config))"
        )
    if entry.record_past:
        raise UnsupportedModelError(
            "found a cache that records past states (assisted decoding); expected a plain cache: "
            "a quantized state cannot be rolled back"
        )
    if not entry.is_conv_states_initialized[0]:
        if not torch.compiler.is_compiling():
            state, none = _zeros(cache, layer, mixer, hidden)
            _keep(entry, state, none)
            # As the cache marks the tensors that it makes, for graphs that torch.compile captures.
            torch._dynamo.mark_static_address(state.conv)
            torch._dynamo.mark_static_address(state.ssm)
        else:
            fresh = mixer.new_state(hidden.shape[0], hidden.device)
            entry.lazy_initialization(conv_states=fresh.conv)
            entry.lazy_initialization(recurrent_states=fresh.ssm)
    entry.has_previous_state[0] = True
    return MixerState(conv=entry.conv_states[0], ssm=entry.recurrent_states[0])


def _zeros(cache: Any, layer: int, mixer: AnyMixer, hidden: Tensor) -> tuple[MixerState, MixerState]:
    """A zero state for a layer, and one of no sequences.

    States for the later layers are made as well, each with tensors of its own: on a CUDA device all are zeroed in one
    go. A layer that turns out to need others has them made.
    """
    batch, device, c = hidden.shape[0], hidden.device, mixer.config
    kind = (batch, c.d_inner, c.d_conv, c.d_state, mixer.state_dtype(), device)
    ahead = _ahead.get(cache)
    if ahead is None or ahead.kind != kind or layer not in ahead.states:

        def unwritten(count: int) -> MixerState:
            conv = torch.empty((count, c.d_inner, c.d_conv), dtype=kind[4], device=device)
            return MixerState(conv, torch.empty((count, c.d_inner, c.d_state), dtype=torch.float32, device=device))

        later = [i for i in range(layer + 1, len(cache.layers)) if unused(cache, i)]
        ahead = _Ahead(kind, unwritten(0), {i: unwritten(batch) for i in (layer, *later)})
        torch._foreach_zero_([tensor for state in ahead.states.values() for tensor in (state.conv, state.ssm)])
        _ahead[cache] = ahead
    return ahead.states.pop(layer), ahead.none


def _keep(entry: Any, state: MixerState, none: MixerState) -> None:
    """Make a layer of a cache keep its state in these tensors; `none`: a state of no sequences.

    With that the cache notes dtype and device and that there are states, without making any.
    """
    entry.lazy_initialization(conv_states=none.conv, recurrent_states=none.ssm)
    entry.conv_states[0], entry.recurrent_states[0] = state.conv, state.ssm


def bind(cache: Any, layer: int, state: MixerState) -> None:
    """Make one layer of an unused transformers cache keep its state in the given tensors, not in some of its own."""
    _keep(cache.layers[layer], state, MixerState(conv=state.conv[:0], ssm=state.ssm[:0]))


def unbind(cache: Any, layer: int) -> None:
    """Give one layer of a transformers cache tensors of its own, with the same values."""
    entry: Any = cache.layers[layer]
    entry.conv_states[0], entry.recurrent_states[0] = entry.conv_states[0].clone(), entry.recurrent_states[0].clone()


def unused(cache: Any, layer: int) -> bool:
    """True for a layer of a transformers cache that can take a state and has none yet."""
    entries = getattr(cache, "layers", ())
    entry: Any = entries[layer] if layer < len(entries) else None
    return (
        hasattr(entry, "conv_states")
        and not entry.record_past
        and not any((*entry.is_conv_states_initialized.values(), *entry.is_recurrent_states_initialized.values()))
    )


def bound(cache: Any, layers: Mapping[int, MixerState]) -> bool:
    """True where a transformers cache keeps the states of these layers in the given tensors still."""
    entries = cache.layers
    for layer, state in layers.items():
        entry = entries[layer]
        if entry.conv_states[0] is not state.conv or entry.recurrent_states[0] is not state.ssm or entry.record_past:
            return False
    return True


def padding_mask(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """The part of a (B, >= L) attention mask that covers these L tokens; None where it masks nothing to come."""
    if mask is None or mask.dim() != 2:
        return None
    if mask.shape[1] != hidden.shape[1]:
        return mask[:, -hidden.shape[1] :]
    return mask if ops.watched() else _as_bool(mask)
