"""A quantized model as the runtime runs it: embedding, blocks, final norm and head, without the library's own loop."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quamba import ops
from quamba.errors import UnsupportedModelError
from quamba.models.adapter import Shell, find_adapter, quantized_layers
from quamba.nn import stack
from quamba.nn.config import MixerState


class Program:
    """A model that is a stack of our blocks between an embedding and a head.

    It holds the model's modules, not the model.

    Attributes:
        embedding: token ids -> hidden states.
        layers: our mixers by layer number.
        tail: the residual stream behind the last block -> logits.
        device: of all of them.
    """

    def __init__(self, model: nn.Module) -> None:
        """Read the modules of a quantized model.

        Raises:
            UnsupportedModelError: the model is not quantized, is more than a stack of our blocks, or lies on
                several devices.
        """
        adapter = find_adapter(model)
        if not isinstance(model.get_submodule(adapter.module_name(adapter.layers(model)[0])), Shell):
            raise UnsupportedModelError("found a float model; expected one that quamba.quantize has been through")
        tail = adapter.tail(model)
        if tail is None:
            raise UnsupportedModelError(
                f"found {type(model).__name__}, which has layers besides its Mamba blocks; expected a stack of Mamba "
                "blocks alone: run the model itself, eagerly"
            )
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        if len(devices) != 1:
            raise UnsupportedModelError(
                f"found a model on {sorted(map(str, devices))}; expected one device: call model.to(device)"
            )
        self.layers = dict(quantized_layers(adapter, model))
        names = (adapter.embedding(model), adapter.final_norm(model), adapter.head(model))
        modules = [*map(model.get_submodule, names), *self.layers.values()]
        self.embedding = modules[0]
        self.tail = tail
        self.device: torch.device = devices.pop()
        self._mixers = list(self.layers.values())
        self._stacked = stack.serves(self._mixers, self.device)
        self._places = _Places(model, [*names, *(f"{adapter.module_name(layer)}.mixer" for layer in self.layers)])
        self._holders = [holder for module in modules for holder in module.modules()]
        self._pointers = self._found_pointers()

    def describes(self, model: nn.Module) -> bool:
        """False once the model has other modules, or its tensors are elsewhere: graphs would read those of before."""
        return self._places.hold(model) and self._found_pointers() == self._pointers

    def _found_pointers(self) -> list[int]:
        return [
            tensor.data_ptr()
            for holder in self._holders
            for tensors in (holder._parameters, holder._buffers)
            for tensor in tensors.values()
            if tensor is not None
        ]

    def step(self, tokens: Tensor, states: Sequence[MixerState]) -> Tensor:
        """One token per sequence.

        Args:
            tokens: int64 (B,).
            states: of B sequences, one per layer; updated in place.

        Returns:
            (B, V) logits.
        """
        stream = self.embedding(tokens[:, None])
        if self._stacked and stack.takes(self._mixers, tokens.shape[0]) and not ops.references_forced():
            return self.tail(stack.run(self._mixers, stream[:, 0], states))  # type: ignore[arg-type]
        return self.tail(self._blocks(stream, None, states))[:, -1]

    def prefill(self, input_ids: Tensor, mask: Tensor | None, states: Sequence[MixerState]) -> Tensor:
        """Whole prompts.

        Args:
            input_ids: int64 (B, L).
            mask: (B, L), 0 at padding, which is on the left; or None.
            states: of B sequences, one per layer; updated in place. Zero them for a new start.

        Returns:
            (B, V): the logits behind each sequence's last token.
        """
        stream = self.embedding(input_ids)
        # Single tokens take the ops for them, whose sums are others.
        if self._stacked and (input_ids.shape[1] > 1 or mask is not None) and not ops.watched():
            stream = stack.prefill(self._mixers, stream, mask, states)  # type: ignore[arg-type]
        else:
            stream = self._blocks(stream, mask, states)
        return self.tail(stream[:, -1:])[:, -1]

    def _blocks(self, stream: Tensor, mask: Tensor | None, states: Sequence[MixerState]) -> Tensor:
        """All blocks: (B, L, E) -> (B, L, E)."""
        for mixer, state in zip(self._mixers, states, strict=True):
            if mixer.config.residual:
                stream = mixer(stream, mask=mask, state=state)
            else:
                wide = stream.to(torch.float32) if mixer.config.residual_in_fp32 else stream
                stream = wide + mixer(wide, mask=mask, state=state)
        return stream


class _Places:
    """Where some modules are in a model: asked before every prompt, so without resolving their names again."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._top = model._modules
        self._slots: dict[tuple[int, str], tuple[dict[str, nn.Module | None], str, nn.Module]] = {}
        for name in names:
            parent = model
            for part in name.split("."):
                child = parent.get_submodule(part)
                self._slots[id(parent), part] = (parent._modules, part, child)
                parent = child
        self._sizes = [
            (slots, len(slots)) for slots in {id(slots): slots for slots, _, _ in self._slots.values()}.values()
        ]

    def hold(self, model: nn.Module) -> bool:
        """Whether this is the model, with the same modules in these places, and as many beside them."""
        return (
            model._modules is self._top
            and all(slots.get(name) is module for slots, name, module in self._slots.values())
            and all(len(slots) == size for slots, size in self._sizes)
        )
