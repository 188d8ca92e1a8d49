"""What a checkpoint's directory holds, and the checks that it is whole (docs/checkpoint.md).

Every tensor has a checksum over its name, dtype, shape and bytes; config.json has one over its contents. Both lie in
the metadata of the safetensors files.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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

# Left out of config.json's checksum: they do not enter the logits, and people edit them.
UNSEALED = ("transformers_version", "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id")

FLOAT_DTYPES = {str(dtype).partition(".")[2]: dtype for dtype in container.DTYPES.values() if dtype.is_floating_point}

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_JSON_LIMIT = 100_000_000


def is_ours(name: str) -> bool:
    """True for the file names that a save writes and replaces."""
    return name in (CONFIG, GENERATION_CONFIG, WEIGHTS, INDEX) or _SHARD.fullmatch(name) is not None


def is_scale(name: str) -> bool:
    """True for the tensors that are float32, finite and positive, whatever the model's dtype."""
    leaf = name.rpartition(".")[2]
    return leaf.endswith("_scale") or leaf == "g_divisor"


def is_guard(entry: Entry) -> bool:
    """True for the empty tensor that makes a load without quamba fail (docs/checkpoint.md)."""
    return entry.dtype == "U8" and entry.shape == (0,)


def tensor_checksum(name: str, tensor: Tensor) -> str:
    """sha256 over name, dtype, shape and bytes."""
    label = json.dumps([name, container.CODES[tensor.dtype], list(tensor.shape)], separators=(",", ":"))
    digest = hashlib.sha256(label.encode() + b"\n")
    digest.update(container.raw(tensor))
    return digest.hexdigest()


def config_checksum(config: Mapping[str, Any]) -> str:
    """sha256 over the canonical JSON of config.json without the UNSEALED keys."""
    sealed = {key: value for key, value in config.items() if key not in UNSEALED}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The `__metadata__` of the safetensors file that holds these tensors."""
    checksums = {name: tensor_checksum(name, tensors[name]) for name in sorted(tensors)}
    ours = {"format_version": FORMAT_VERSION, "config": config_checksum(config), "tensors": checksums}
    return {"format": "pt", QUANT_METHOD: json.dumps(ours, separators=(",", ":"))}


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
            f"{where}: found the keys {sorted(map(str, found))} in quantization_config; expected {sorted(keys)}; {REMEDY}"
        )
    try:
        return Quantization.from_dict({"recipe": found["recipe"], "statistics": found["statistics"]})
    except RecipeError as error:
        raise CheckpointError(f"{where}: {error}; {REMEDY}") from error


@dataclass(frozen=True)
class Expected:
    """The form that a tensor must have in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Manifest:
    """A directory whose headers and config.json have been checked; `tensors` checks the rest while reading.

    Attributes:
        directory: where it lies.
        config: config.json.
        quantization: from its quantization_config.
        dtype: of the float tensors that are not scales.
        files: the tensors in each file.
        checksums: of each tensor.
    """

    directory: Path
    config: dict[str, Any]
    quantization: Quantization
    dtype: torch.dtype
    files: dict[Path, dict[str, Entry]]
    checksums: dict[str, str]

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read config.json, the index and the headers, and check that they belong together.

        Raises:
            CheckpointError: they do not, or one of them is missing or malformed.
        """
        path = directory / CONFIG
        config = read_json(path)
        quantization = parse_quantization_config(config.get("quantization_config"), str(path))
        dtype = FLOAT_DTYPES.get(str(config.get("dtype")))
        if dtype is None:
            raise CheckpointError(
                f"{path}: found dtype {config.get('dtype')!r}; expected one of {list(FLOAT_DTYPES)}; {REMEDY}"
            )
        checksum = config_checksum(config)
        files: dict[Path, dict[str, Entry]] = {}
        checksums: dict[str, str] = {}
        for shard, listed in _shards(directory).items():
            files[shard], sealed = _read_shard(shard, checksum=checksum, config_path=path)
            if listed is not None and listed != set(files[shard]):
                name = min(listed ^ set(files[shard]))
                raise CheckpointError(f"{shard}: tensor {name!r} is in the file or in {INDEX}, not in both; {REMEDY}")
            checksums |= sealed
        return cls(directory, config, quantization, dtype, files, checksums)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, CPU tensor) for every tensor but the guard, its checksum and, for a scale, its values checked.

        Raises:
            CheckpointError: one of them is damaged.
        """
        for path, entries in self.files.items():
            with _opened(path) as file:
                for name, tensor in container.read_tensors(file, entries, path):
                    if tensor_checksum(name, tensor) != self.checksums[name]:
                        raise CheckpointError(f"{path}: tensor {name!r} differs from its checksum; {REMEDY}")
                    if not is_guard(entries[name]):
                        check_scale(name, tensor, str(path))
                        yield name, tensor

    def check(self, expected: Mapping[str, Expected], *, mixed: bool = False) -> None:
        """Compare names, shapes and dtypes with those of the model that config.json describes.

        Args:
            expected: by name.
            mixed: whether the float tensors may be of any float dtype.

        Raises:
            CheckpointError: a tensor is missing, surplus, or of another form.
        """
        found = {
            name: (path, entry)
            for path, entries in self.files.items()
            for name, entry in entries.items()
            if not is_guard(entry)
        }
        for name, (path, entry) in found.items():
            if name not in expected:
                raise CheckpointError(f"{path}: found the tensor {name!r}; the model in {CONFIG} has none such; {REMEDY}")
            form = Expected(shape=entry.shape, dtype=container.DTYPES[entry.dtype])
            check_form(name, form, expected[name], where=str(path), mixed=mixed)
        missing = sorted(set(expected) - set(found))
        if missing:
            raise CheckpointError(
                f"{self.directory}: found no tensor {missing[0]!r} ({len(missing)} missing in all); expected it, as "
                f"{CONFIG} describes the model; {REMEDY}"
            )


def check_form(name: str, found: Expected, expected: Expected, *, where: str, mixed: bool = False) -> None:
    """Raise CheckpointError where a tensor's shape or dtype is not the expected one (mixed: any float for a float)."""
    free = mixed and not is_scale(name) and found.dtype.is_floating_point and expected.dtype.is_floating_point
    if found.shape != expected.shape or (found.dtype != expected.dtype and not free):
        raise CheckpointError(
            f"{where}: tensor {name!r} has shape {found.shape} and dtype {found.dtype}; "
            f"expected {expected.shape} and {expected.dtype}; {REMEDY}"
        )


def check_scale(name: str, tensor: Tensor, where: str) -> None:
    """Raise CheckpointError where a scale is NaN, infinite or not positive."""
    if is_scale(name) and not bool(((tensor > 0) & torch.isfinite(tensor)).all()):
        raise CheckpointError(
            f"{where}: tensor {name!r} holds a scale that is NaN, infinite or not positive; "
            "expected finite positive scales; quantize the model again"
        )


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); expected a safetensors file; {REMEDY}") from error


def _shards(directory: Path) -> dict[Path, set[str] | None]:
    """The weight files, and the tensors that the index lists for each (None without an index)."""
    single, index = directory / WEIGHTS, directory / INDEX
    if single.exists() == index.exists():
        found = "both" if single.exists() else "neither"
        raise CheckpointError(f"{directory}: found {found} of {WEIGHTS} and {INDEX}; expected one of them; {REMEDY}")
    if single.exists():
        return {single: None}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: found no weight_map; expected tensor names and their files; {REMEDY}")
    shards: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise CheckpointError(
                f"{index}: found the file name {file!r} for {name!r}; expected model-00001-of-00002.safetensors "
                f"or the like; {REMEDY}"
            )
        listed = shards.setdefault(directory / file, set())
        assert listed is not None
        listed.add(name)
    return dict(sorted(shards.items()))


def _read_shard(path: Path, *, checksum: str, config_path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries of one file and their checksums, the seal checked."""
    with _opened(path) as file:
        entries, metadata = container.read_header(file, path)
    if set(metadata) != {"format", QUANT_METHOD} or metadata["format"] != "pt":
        raise CheckpointError(
            f"{path}: found the metadata {sorted(metadata)}; expected 'format' = 'pt' and {QUANT_METHOD!r}; "
            f"the file was not written by quamba, or {REMEDY}"
        )
    sealed = container.parse_json(metadata[QUANT_METHOD], path)
    if sealed.get("format_version") != FORMAT_VERSION or type(sealed["format_version"]) is not int:
        raise CheckpointError(
            f"{path}: found format_version {sealed.get('format_version')!r}; expected {FORMAT_VERSION}; "
            "load it with the version of quamba that saved it, or a newer one"
        )
    sums = sealed.get("tensors")
    if set(sealed) != {"format_version", "config", "tensors"} or not isinstance(sums, dict):
        raise CheckpointError(f"{path}: found malformed checksums; expected config and tensors; {REMEDY}")
    if set(sums) != set(entries):
        name = min(set(sums) ^ set(entries))
        raise CheckpointError(f"{path}: tensor {name!r} has a checksum or bytes, not both; {REMEDY}")
    if sealed["config"] != checksum:
        raise CheckpointError(
            f"{config_path}: the contents differ from the checksum in {path.name}; expected config.json as it was saved "
            f"(only {', '.join(UNSEALED)} may be edited); restore it, or save the model again"
        )
    return entries, sums
