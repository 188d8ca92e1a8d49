"""The empty quantized model that config.json describes, on the meta device, and how it becomes a model."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from quamba.checkpoint.layout import is_scale
from quamba.checkpoint.manifest import Expected
from quamba.convert import build_skeleton, finalize
from quamba.errors import CheckpointError
from quamba.models.adapter import find_adapter
from quamba.nn.mixer import Mixer
from quamba.recipe import Recipe

MAMBA_SSM = "mamba_ssm"


@dataclass(frozen=True)
class Skeleton:
    """An empty quantized model.

    Attributes:
        model: with tensors on the meta device.
        ties: name -> name of the float parameter that it shares; only the latter is saved.
        guard: a name that the float model has and this one has not.
    """

    model: nn.Module
    ties: Mapping[str, str]
    guard: str

    def expected(self, dtype: torch.dtype) -> dict[str, Expected]:
        """The form of every saved tensor, where the float ones are of that dtype (scales are float32)."""
        found = {}
        for name, tensor in self.model.state_dict().items():
            if name in self.ties:
                continue
            free = tensor.is_floating_point() and not is_scale(name)
            found[name] = Expected(shape=tuple(tensor.shape), dtype=dtype if free else tensor.dtype)
        return found

    def finish(self) -> nn.Module:
        """Tie and derive what is not saved, once every saved tensor is filled; returns the model.

        Raises:
            CheckpointError: a tensor is still empty.
        """
        for name, source in self.ties.items():
            path, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(path), leaf, self.model.get_parameter(source))
        finalize(self.model)
        for module in self.model.modules():
            if isinstance(module, Mixer):
                module.requires_grad_(False)
        empty = [name for name, tensor in _tensors(self.model) if tensor.is_meta]
        if empty:
            raise CheckpointError(
                f"found the tensor {empty[0]!r} without values after loading; expected all of them to be filled; "
                "load without offloading (device_map)"
            )
        return self.model.eval()


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def to_skeleton(model: nn.Module, recipe: Recipe) -> Skeleton:
    """Turn a float model on meta into the recipe's empty quantized one, in place.

    Raises:
        UnsupportedModelError: quamba does not know the model.
        RecipeError: an override matches nothing in it.
    """
    adapter = find_adapter(model)
    head, embedding = adapter.head(model), adapter.embedding(model)
    before = set(model.state_dict())
    build_skeleton(adapter, model, recipe)
    ties = {}
    # The residual rotation folds the final norm's weight into the head alone.
    rotated = recipe.rotates_residual
    if adapter.tied(model) and not rotated and recipe.spec("head.weight") is None and recipe.spec("embedding") is None:
        ties = {f"{head}.weight": f"{embedding}.weight"}
    return Skeleton(model=model, ties=ties, guard=min(before - set(model.state_dict())))


def empty_skeleton(config: Mapping[str, Any], recipe: Recipe, *, dtype: torch.dtype, where: str) -> Skeleton:
    """The empty quantized model of a config.json.

    Args:
        config: its contents.
        recipe: from its quantization_config.
        dtype: of the float tensors that are not scales.
        where: names the file in messages.

    Raises:
        CheckpointError: no model can be built from it.
    """
    try:
        return to_skeleton(_empty_model(config, dtype), recipe)
    # Whatever a model's constructor raises on a config that it does not take is an error of the checkpoint.
    except Exception as error:
        raise CheckpointError(
            f"{where}: no model can be built from it ({type(error).__name__}: {error}); expected the config of a model "
            "that quamba supports; save the model again"
        ) from error


def _empty_model(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    content = {key: value for key, value in config.items() if key != "quantization_config"}
    model_type = content.pop("model_type")
    if model_type == MAMBA_SSM:
        return _empty_mamba_ssm(content, dtype)
    factory: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model: nn.Module = factory.from_config(AutoConfig.for_model(model_type, **content), dtype=dtype)
    return model


def _empty_mamba_ssm(content: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    try:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except ImportError as error:
        raise CheckpointError(
            f"found a model of mamba-ssm, which cannot be imported ({error}); install it: pip install quamba[mamba-ssm]"
        ) from error
    known = {field.name for field in fields(MambaConfig)}
    content = {key: value for key, value in content.items() if key not in ("architectures", "dtype")}
    if not set(content) <= known:
        raise CheckpointError(f"found the keys {sorted(set(content) - known)}; expected those of MambaConfig")
    model: nn.Module = MambaLMHeadModel(MambaConfig(**content), device="meta", dtype=dtype)
    return model
