"""The recurrent states of all layers for a number of sequences, allocated once; a slot is one sequence's row."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from quamba.errors import DtypeError, SizeError
from quamba.models.adapter import AnyMixer
from quamba.nn.config import MixerState


class States:
    """One MixerState (slots, ...) per layer, zero at first; views of one tensor for all layers of a kind."""

    def __init__(self, layers: Mapping[int, AnyMixer], slots: int, device: torch.device) -> None:
        """Allocate.

        Args:
            layers: our mixers by layer number, in the order in which they run.
            slots: how many sequences.
            device: where.
        """
        self.slots = slots
        shapes = {layer: mixer.new_state(slots, torch.device("meta")) for layer, mixer in layers.items()}
        convs, self._convs = _stacked({layer: state.conv for layer, state in shapes.items()}, device)
        ssms, self._ssms = _stacked({layer: state.ssm for layer, state in shapes.items()}, device)
        self.by_layer = {layer: MixerState(conv=convs[layer], ssm=ssms[layer]) for layer in layers}
        self._rows: dict[int, list[MixerState]] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """All layers' tensors, convolution and scan in turn."""
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
        for whole in (*self._convs, *self._ssms):
            whole[:, :slots].zero_()

    def copy_slot(self, slot: int, source: "States") -> None:
        """Put the first slot of other states of the same layers into a slot of these."""
        for whole, other in zip((*self._convs, *self._ssms), (*source._convs, *source._ssms), strict=True):
            whole[:, slot].copy_(other[:, 0])

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


def _stacked(shapes: Mapping[int, Tensor], device: torch.device) -> tuple[dict[int, Tensor], list[Tensor]]:
    """For each layer a zero tensor like its own, and the (layers, ...) tensors of which they are views."""
    kinds: dict[object, list[int]] = {}
    for layer, like in shapes.items():
        kinds.setdefault((like.shape, like.dtype), []).append(layer)
    views: dict[int, Tensor] = {}
    wholes = []
    for layers in kinds.values():
        like = shapes[layers[0]]
        wholes.append(torch.zeros(len(layers), *like.shape, dtype=like.dtype, device=device))
        views.update(zip(layers, wholes[-1], strict=True))
    return views, wholes


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return f"{listed[:4] or 'nothing'}{f' and {len(listed) - 4} more' if len(listed) > 4 else ''}"
