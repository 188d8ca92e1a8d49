"""The recurrent states of all layers for a number of sequences, allocated once; a slot is one sequence's row."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from quamba.errors import DtypeError, SizeError
from quamba.models.adapter import AnyMixer
from quamba.nn.config import MixerState


class States:
    """One MixerState (slots, ...) per layer, zero at first."""

    def __init__(self, layers: Mapping[int, AnyMixer], slots: int, device: torch.device) -> None:
        """Allocate.

        Args:
            layers: our mixers by layer number, in the order in which they run.
            slots: how many sequences.
            device: where.
        """
        self.slots = slots
        self.by_layer = {layer: mixer.new_state(slots, device) for layer, mixer in layers.items()}
        self._rows: dict[int, list[MixerState]] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, convolution and scan in turn."""
        return [tensor for state in self.by_layer.values() for tensor in (state.conv, state.ssm)]

    @property
    def bytes(self) -> int:
        """Of all slots."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def first(self, count: int) -> list[MixerState]:
        """The states of slots 0 to count - 1: views, the same objects at every call."""
        if count not in self._rows:
            self._rows[count] = [
                MixerState(conv=state.conv[:count], ssm=state.ssm[:count]) for state in self.by_layer.values()
            ]
        return self._rows[count]

    def zero(self, slots: int | None = None) -> None:
        """Clear the first so many slots, or all."""
        count = self.slots if slots is None else slots
        torch._foreach_zero_([tensor for state in self.first(count) for tensor in (state.conv, state.ssm)])

    def copy_slot(self, slot: int, source: "States") -> None:
        """Put the first slot of other states into a slot of these."""
        torch._foreach_copy_([tensor[slot] for tensor in self.tensors], [tensor[0] for tensor in source.tensors])

    def export(self, slots: Sequence[int]) -> dict[str, Tensor]:
        """Copies of some slots, on the same device: "layers.<i>.conv" (n, D, K) and "layers.<i>.ssm" (n, D, N)."""
        index = torch.tensor(list(slots), device=self.tensors[0].device)
        found = {}
        for layer, state in self.by_layer.items():
            found[f"layers.{layer}.conv"] = state.conv.index_select(0, index)
            found[f"layers.{layer}.ssm"] = state.ssm.index_select(0, index)
        return found

    def load(self, tensors: Mapping[str, Tensor], slots: Sequence[int]) -> None:
        """Put exported states into some slots.

        Raises:
            SizeError: tensors are missing, surplus or of the wrong shape.
            DtypeError: one is of the wrong dtype (another recipe's, say).
        """
        expected = self._named()
        if set(tensors) != set(expected):
            missing, surplus = _some(set(expected) - set(tensors)), _some(set(tensors) - set(expected))
            raise SizeError(
                f"found states without {missing} and with {surplus}; expected exactly the model's {len(expected)}"
            )
        for name, own in expected.items():
            shape = (len(slots), *own.shape[1:])
            if tuple(tensors[name].shape) != shape:
                raise SizeError(f"found {name} of shape {tuple(tensors[name].shape)}; expected {shape}")
            if tensors[name].dtype != own.dtype:
                raise DtypeError(f"found {name} of dtype {tensors[name].dtype}; expected {own.dtype}")
        for name, own in expected.items():
            own.index_copy_(0, torch.tensor(list(slots), device=own.device), tensors[name].to(own.device))

    def _named(self) -> dict[str, Tensor]:
        named = {}
        for layer, state in self.by_layer.items():
            named[f"layers.{layer}.conv"], named[f"layers.{layer}.ssm"] = state.conv, state.ssm
        return named


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return f"{listed[:4] or 'nothing'}{f' and {len(listed) - 4} more' if len(listed) > 4 else ''}"
