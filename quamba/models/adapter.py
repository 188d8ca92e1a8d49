"""What an architecture has to tell: one adapter per family, found by the model's type.

To add a family with a Mamba-1 mixer, write one file in quamba/models with a subclass of Adapter under `@register`
(CONTRIBUTING.md).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quamba.errors import UnsupportedModelError
from quamba.nn.config import BlockConfig
from quamba.nn.mixer import Mixer
from quamba.nn.named import PassThrough, swap
from quamba.nn.quantized_mixer import QuantizedMixer

AnyMixer = Mixer | QuantizedMixer


class Shell(nn.Module):
    """What stands in the model in place of the original module: holds our mixer, speaks the family's calls."""

    mixer: AnyMixer

    def __init__(self, mixer: AnyMixer, layer: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.layer = layer
        self.eval()


class Adapter(ABC):
    """One family of models. Names are dotted module names inside the model.

    Attributes:
        model_types: the values of `config.model_type` that this adapter serves.
        shell: the class that stands in for the replaced module.
    """

    model_types: ClassVar[tuple[str, ...]]
    shell: ClassVar[type[Shell]]

    @abstractmethod
    def layers(self, model: nn.Module) -> list[int]:
        """The numbers of the layers with a Mamba mixer."""

    @abstractmethod
    def config(self, model: nn.Module, layer: int) -> BlockConfig:
        """The shape of one layer's block."""

    @abstractmethod
    def tensors(self, model: nn.Module, layer: int) -> dict[str, Tensor]:
        """One layer's original tensors under the names of `BlockConfig.tensor_shapes`."""

    @abstractmethod
    def module_name(self, layer: int) -> str:
        """The module that the shell replaces."""

    @abstractmethod
    def embedding(self, model: nn.Module) -> str:
        """The token embedding."""

    @abstractmethod
    def head(self, model: nn.Module) -> str:
        """The linear that makes logits."""

    @abstractmethod
    def final_norm(self, model: nn.Module) -> str:
        """The norm before the head."""

    @abstractmethod
    def run_backbone(self, model: nn.Module, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """The hidden states (B, L, E) that the head reads, without computing logits."""

    def tail(self, model: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """What makes logits (..., V) of the residual stream (..., E) behind the last block, without holding the model.

        None where the model is more than an embedding, our blocks in a row, and these: its own forward then runs it.
        """
        return None

    def absorbed(self, layer: int) -> list[str]:
        """Modules outside the replaced one whose work the mixer takes over; a pass-through stands in for them."""
        return []

    def rotate_rest(self, model: nn.Module) -> None:
        """Fold the rotation of the residual stream into the float modules that are neither mixer nor end.

        Raises:
            UnsupportedModelError: the family has such modules and no way to do it.
        """
        return

    def kept_float(self, model: nn.Module) -> dict[str, str]:
        """Names of the parts that stay in float whatever the recipe says, and why."""
        return {self.final_norm(model): "the norm before the head: its output is quantized on the head's entry"}

    def dtype(self, model: nn.Module) -> torch.dtype:
        """The dtype of the float weights."""
        return next(p.dtype for p in model.parameters() if p.is_floating_point())

    def tied(self, model: nn.Module) -> bool:
        """True where head and embedding share one weight."""
        return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))

    def untie(self, model: nn.Module) -> None:
        """Note in the model's config that head and embedding are two weights from now on."""
        config: Any = model.config
        config.tie_word_embeddings = False

    def shell_at(self, model: nn.Module, layer: int) -> Shell:
        """The shell that stands in one layer."""
        module = model.get_submodule(self.module_name(layer))
        if not isinstance(module, Shell):
            raise UnsupportedModelError(
                f"found {type(module).__name__} at {self.module_name(layer)!r}; expected our shell"
            )
        return module

    def install(self, model: nn.Module, layer: int, mixer: AnyMixer) -> dict[str, nn.Module]:
        """Put a mixer in its shell into the model; returns what was there, by module name."""
        old = {self.module_name(layer): swap(model, self.module_name(layer), self.shell(mixer, layer))}
        for name in self.absorbed(layer):
            old[name] = swap(model, name, PassThrough())
        return old

    def after_install(self, model: nn.Module) -> None:
        """Bring the model's own bookkeeping in line with the replaced modules."""
        return


ADAPTERS: dict[str, Adapter] = {}


def register(cls: type[Adapter]) -> type[Adapter]:
    """Class decorator: make the adapter known under its model types."""
    for model_type in cls.model_types:
        ADAPTERS[model_type] = cls()
    return cls


def model_type_of(model: nn.Module) -> str:
    """`config.model_type`, or "mamba_ssm" for the models of that package, which have none."""
    config: Any = getattr(model, "config", None)
    found = getattr(config, "model_type", None)
    if isinstance(found, str):
        return found
    if hasattr(config, "ssm_cfg") and hasattr(model, "backbone"):
        return "mamba_ssm"
    return type(model).__name__


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter for a model.

    Raises:
        UnsupportedModelError: there is none, or the model has no language-modelling head or no Mamba mixer.
    """
    found = model_type_of(model)
    if found not in ADAPTERS:
        raise UnsupportedModelError(
            f"found a model of type {found!r}; expected one of {sorted(ADAPTERS)} "
            "(transformers' ForCausalLM models, or mamba-ssm's MambaLMHeadModel with Mamba-1 layers)"
        )
    adapter = ADAPTERS[found]
    try:
        model.get_submodule(adapter.head(model))
        model.get_submodule(adapter.embedding(model))
    except AttributeError as error:
        raise UnsupportedModelError(
            f"found {type(model).__name__} of type {found!r} without the module {error}; expected the causal language "
            "model with its head (AutoModelForCausalLM)"
        ) from error
    if not adapter.layers(model):
        raise UnsupportedModelError(f"found {type(model).__name__} without Mamba layers; expected at least one")
    return adapter


def quantized_layers(adapter: Adapter, model: nn.Module) -> Iterator[tuple[int, AnyMixer]]:
    """(layer number, our mixer) for every layer of a model that has our mixers."""
    for layer in adapter.layers(model):
        yield layer, adapter.shell_at(model, layer).mixer
