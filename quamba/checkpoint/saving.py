"""Saving a quantized model: checked first, sealed with checksums, then put in place as a whole."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import PreTrainedModel

from quamba.checkpoint import container, layout
from quamba.checkpoint.directory import replacing
from quamba.checkpoint.manifest import Expected, check_form, check_values
from quamba.checkpoint.skeleton import MAMBA_SSM, Skeleton, empty_skeleton
from quamba.errors import CheckpointError
from quamba.models.adapter import find_adapter, model_type_of
from quamba.quantization import Quantization

MAX_SHARD_SIZE = "50GB"


def save(model: nn.Module, directory: str | os.PathLike[str], *, max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
    """Write a quantized model as safetensors and config.json (docs/checkpoint.md).

    A directory that exists is replaced as a whole at the end; its other files (a tokenizer's, say) are kept.

    Args:
        model: quantized by quamba.
        directory: where to; made where there is none.
        max_shard_size: of one safetensors file, in bytes or as text such as "5GB".

    Raises:
        CheckpointError: the model is not quantized, or could not be loaded again from what would be written.
        OSError: the disk is full, say; the old directory is as it was.
    """
    quantization = getattr(model, "quantization", None)
    if not isinstance(quantization, Quantization):
        raise CheckpointError(
            f"found a {type(model).__name__} that quamba has not quantized; expected one from quamba.quantize "
            "or quamba.load"
        )
    if quantization.recipe.simulated:
        raise CheckpointError(
            f"found a model of the recipe {quantization.recipe.label!r}; expected int8 values to save: "
            "a simulation is float, and is there to be evaluated"
        )
    config = _config(model, quantization)
    dtype = layout.FLOAT_DTYPES[config["dtype"]]
    skeleton = empty_skeleton(config, quantization.recipe, dtype=dtype, where="the model's config")
    tensors = _tensors(model, skeleton, dtype, mixed=config["model_type"] == MAMBA_SSM)
    # In the CPU's memory, with no bytes: a guard against loaders that do not know this format (docs/checkpoint.md).
    tensors[skeleton.guard] = torch.empty(0, dtype=torch.uint8)
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=layout.SHARD_PATTERN, max_shard_size=max_shard_size
    )
    with replacing(Path(directory), layout.is_ours) as new:
        for file, names in split.filename_to_tensors.items():
            part = {name: tensors[name] for name in names}
            container.write(new / file, part, layout.seal(config, part))
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            _write_text(new / layout.INDEX, _json(index))
        _write_text(new / layout.CONFIG, _json(config))
        if isinstance(model, PreTrainedModel) and model.can_generate():
            _write_text(new / layout.GENERATION_CONFIG, model.generation_config.to_json_string())


def _config(model: nn.Module, quantization: Quantization) -> dict[str, Any]:
    """The contents of config.json."""
    dtype = find_adapter(model).dtype(model)
    ours = {
        "architectures": [type(model).__name__],
        "dtype": str(dtype).partition(".")[2],
        "quantization_config": layout.quantization_config(quantization),
    }
    if model_type_of(model) == MAMBA_SSM:
        return {"model_type": MAMBA_SSM, **asdict(model.config), **ours}  # type: ignore[call-overload]
    if not isinstance(model, PreTrainedModel) or model.is_remote_code():
        raise CheckpointError(
            f"found a {type(model).__name__} whose code is neither transformers' nor mamba-ssm's; "
            "expected a model class of theirs: it could not be built again on loading"
        )
    found: dict[str, Any] = json.loads(model.config.to_json_string())
    return found | ours


def _tensors(model: nn.Module, skeleton: Skeleton, dtype: torch.dtype, *, mixed: bool) -> dict[str, Tensor]:
    """The tensors to save, compared with what loading will expect."""
    where = f"the {type(model).__name__} in memory"
    found: dict[str, Tensor] = dict(model.state_dict())
    for name, source in skeleton.ties.items():
        if name in found and found[name].data_ptr() != found[source].data_ptr():
            raise CheckpointError(
                f"{where}: {name!r} is not {source!r}; expected them tied, as the config says; tie them"
            )
        found.pop(name, None)
    expected = skeleton.expected(dtype)
    if set(found) != set(expected):
        name = min(set(found) ^ set(expected))
        has, lacks = ("the model", "its config") if name in found else ("its config", "the model")
        raise CheckpointError(
            f"{where}: {has} has a tensor {name!r} and {lacks} has none; expected the same; "
            "quantize the model again after changing modules or config"
        )
    for name, tensor in found.items():
        form = Expected(shape=tuple(tensor.shape), dtype=tensor.dtype)
        remedy = "do not cast a quantized model; load it with dtype=, or quantize a model of that dtype"
        check_form(name, form, expected[name], where=where, mixed=mixed, remedy=remedy)
        if tensor.is_meta:
            raise CheckpointError(f"{where}: tensor {name!r} has no values; expected them in memory, not offloaded")
        check_values(name, tensor, where)
    return found


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _write_text(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
