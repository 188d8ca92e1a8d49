"""The format: file names, checksums, and the quantization_config (docs/checkpoint.md).

Every tensor has a checksum over its name, dtype, shape and bytes; config.json has one over its contents. Both lie in
the metadata of the safetensors files.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from quamba.checkpoint import container
from quamba.checkpoint.container import REMEDY, Entry
from quamba.errors import CheckpointError, RecipeError
from quamba.quantization import Quantization

FORMAT_VERSION = 1
QUANT_METHOD = "quamba"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_PATTERN = "model{suffix}.safetensors"
# In the metadata of each safetensors file; the checksums of the tensors are in the order of the bytes.
SEAL_VERSION = "quamba.format_version"
SEAL_CONFIG = "quamba.config"
SEAL_TENSORS = "quamba.tensors"

# Left out of config.json's checksum: they do not enter the logits, and people edit them.
UNSEALED = ("transformers_version", "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id")

FLOAT_DTYPES = {str(dtype).partition(".")[2]: dtype for dtype in container.DTYPES.values() if dtype.is_floating_point}

SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_JSON_LIMIT = 100_000_000


def is_ours(name: str) -> bool:
    """True for the file names that a save writes and replaces."""
    return name in (CONFIG, GENERATION_CONFIG, WEIGHTS, INDEX) or SHARD.fullmatch(name) is not None


def is_scale(name: str) -> bool:
    """True for the scales, which are float32 whatever the model's dtype."""
    return name.endswith("_scale")


def is_positive(name: str) -> bool:
    """True for the tensors whose values must be finite and positive: scales and smoothing divisors."""
    return is_scale(name) or name.rpartition(".")[2] == "g_divisor"


def is_guard(entry: Entry) -> bool:
    """True for the empty tensor that makes a load without quamba fail (docs/checkpoint.md)."""
    return entry.dtype == "U8" and entry.shape == (0,)


def tensor_checksum(name: str, tensor: Tensor) -> str:
    """The checksum of name, dtype, shape and bytes: sha256 in base64, 43 characters."""
    label = json.dumps([name, container.CODES[tensor.dtype], list(tensor.shape)], separators=(",", ":"))
    digest = hashlib.sha256(label.encode() + b"\n")
    digest.update(container.raw(tensor))
    return _text(digest.digest())


def config_checksum(config: Mapping[str, Any]) -> str:
    """The checksum of config.json's canonical JSON without the UNSEALED keys."""
    sealed = {key: value for key, value in config.items() if key not in UNSEALED}
    return _text(hashlib.sha256(json.dumps(sealed, sort_keys=True, separators=(",", ":")).encode()).digest())


def _text(digest: bytes) -> str:
    return base64.b64encode(digest).decode().rstrip("=")


def seal(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The `__metadata__` of the safetensors file that holds these tensors."""
    return {
        "format": "pt",
        SEAL_VERSION: str(FORMAT_VERSION),
        SEAL_CONFIG: config_checksum(config),
        SEAL_TENSORS: " ".join(tensor_checksum(name, tensors[name]) for name in container.order(tensors)),
    }


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError where there is none."""
    try:
        with path.open("rb") as file:
            data = file.read(_JSON_LIMIT + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); expected a JSON file; {REMEDY}") from error
    if len(data) > _JSON_LIMIT:
        raise CheckpointError(f"{path}: found more than {_JSON_LIMIT} bytes; expected a small JSON file; {REMEDY}")
    return container.parse_json(data, path)


def quantization_config(quantization: Quantization) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, **quantization.to_dict()}


def parse_quantization_config(found: Any, where: str) -> Quantization:
    """Inverse of `quantization_config`.

    Args:
        found: the value in config.json.
        where: names the file in messages.

    Raises:
        CheckpointError: another method, an unknown format version, missing or unknown keys, a malformed recipe.
    """
    if not isinstance(found, Mapping) or found.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{where}: found no quantization_config with quant_method {QUANT_METHOD!r}; expected a model that quamba "
            "saved; load other models with transformers"
        )
    version = found.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: found format_version {version!r}; expected {FORMAT_VERSION}; "
            "load it with the version of quamba that saved it, or a newer one"
        )
    keys = {"quant_method", "format_version", "recipe", "statistics"}
    if set(found) != keys:
        raise CheckpointError(
            f"{where}: found the keys {sorted(map(str, found))} in quantization_config; "
            f"expected {sorted(keys)}; {REMEDY}"
        )
    try:
        return Quantization.from_dict({"recipe": found["recipe"], "statistics": found["statistics"]})
    except RecipeError as error:
        raise CheckpointError(f"{where}: {error}; {REMEDY}") from error
