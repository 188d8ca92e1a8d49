"""What a checkpoint's directory holds, and the checks that it is whole."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quamba.checkpoint import container
from quamba.checkpoint.container import REMEDY, Entry
from quamba.checkpoint.layout import (
    CONFIG,
    FLOAT_DTYPES,
    FORMAT_VERSION,
    INDEX,
    SEAL_CONFIG,
    SEAL_TENSORS,
    SEAL_VERSION,
    SHARD,
    UNSEALED,
    WEIGHTS,
    config_checksum,
    is_guard,
    is_positive,
    is_scale,
    parse_quantization_config,
    read_json,
    tensor_checksum,
)
from quamba.errors import CheckpointError
from quamba.quantization import Quantization


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
        checksums: of the tensors in each file.
    """

    directory: Path
    config: dict[str, Any]
    quantization: Quantization
    dtype: torch.dtype
    files: dict[Path, dict[str, Entry]]
    checksums: dict[Path, list[str]]

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
        checksums: dict[Path, list[str]] = {}
        for shard, listed in _shards(directory).items():
            files[shard], checksums[shard] = _read_shard(shard, checksum=checksum, config_path=path)
            if listed is not None and listed != set(files[shard]):
                name = min(listed ^ set(files[shard]))
                raise CheckpointError(f"{shard}: tensor {name!r} is in the file or in {INDEX}, not in both; {REMEDY}")
        return cls(directory, config, quantization, dtype, files, checksums)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, CPU tensor) for every tensor but the guard, its checksum and, for a scale, its values checked.

        Raises:
            CheckpointError: one of them is damaged.
        """
        for path, entries in self.files.items():
            checksums = self.checksums[path]
            if len(checksums) != len(entries):
                raise CheckpointError(f"{path}: found {len(checksums)} checksums of {len(entries)} tensors; {REMEDY}")
            with _opened(path) as file:
                read = container.read_tensors(file, entries, path)
                for (name, tensor), checksum in zip(read, checksums, strict=True):
                    if tensor_checksum(name, tensor) != checksum:
                        raise CheckpointError(f"{path}: tensor {name!r} differs from its checksum; {REMEDY}")
                    if not is_guard(entries[name]):
                        check_values(name, tensor, str(path))
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
                raise CheckpointError(
                    f"{path}: found the tensor {name!r}; the model in {CONFIG} has none such; {REMEDY}"
                )
            form = Expected(shape=entry.shape, dtype=container.DTYPES[entry.dtype])
            check_form(name, form, expected[name], where=str(path), mixed=mixed)
        missing = sorted(set(expected) - set(found))
        if missing:
            raise CheckpointError(
                f"{self.directory}: found no tensor {missing[0]!r} ({len(missing)} missing in all); expected it, as "
                f"{CONFIG} describes the model; {REMEDY}"
            )


def check_form(
    name: str, found: Expected, expected: Expected, *, where: str, mixed: bool = False, remedy: str = REMEDY
) -> None:
    """Raise CheckpointError where a tensor's shape or dtype is not the expected one (mixed: any float for a float)."""
    free = mixed and not is_scale(name) and found.dtype.is_floating_point and expected.dtype.is_floating_point
    if found.shape != expected.shape or (found.dtype != expected.dtype and not free):
        raise CheckpointError(
            f"{where}: tensor {name!r} has shape {found.shape} and dtype {found.dtype}; "
            f"expected {expected.shape} and {expected.dtype}; {remedy}"
        )


def check_values(name: str, tensor: Tensor, where: str) -> None:
    """Raise CheckpointError where a scale or a divisor is NaN, infinite or not positive."""
    if is_positive(name) and not bool(((tensor > 0) & torch.isfinite(tensor)).all()):
        raise CheckpointError(
            f"{where}: tensor {name!r} holds a value that is NaN, infinite or not positive; "
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
        if not isinstance(file, str) or not SHARD.fullmatch(file):
            raise CheckpointError(
                f"{index}: found the file name {file!r} for {name!r}; expected model-00001-of-00002.safetensors "
                f"or the like; {REMEDY}"
            )
        listed = shards.setdefault(directory / file, set())
        assert listed is not None
        listed.add(name)
    return dict(sorted(shards.items()))


def _read_shard(path: Path, *, checksum: str, config_path: Path) -> tuple[dict[str, Entry], list[str]]:
    """The entries of one file and their checksums; the version and config.json are checked against the metadata."""
    with _opened(path) as file:
        entries, metadata = container.read_header(file, path)
    version = metadata.get(SEAL_VERSION)
    if version is None:
        raise CheckpointError(
            f"{path}: found the metadata {sorted(metadata)}; expected {SEAL_VERSION!r} among them; the file was not "
            f"written by quamba, or {REMEDY}"
        )
    if version != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path}: found {SEAL_VERSION} {version!r}; expected '{FORMAT_VERSION}'; "
            "load it with the version of quamba that saved it, or a newer one"
        )
    keys = {"format", SEAL_VERSION, SEAL_CONFIG, SEAL_TENSORS}
    if set(metadata) != keys or metadata["format"] != "pt":
        raise CheckpointError(f"{path}: found the metadata {sorted(metadata)}; expected {sorted(keys)}; {REMEDY}")
    if metadata[SEAL_CONFIG] != checksum:
        raise CheckpointError(
            f"{config_path}: the contents differ from the checksum in {path.name}; expected config.json as it was "
            f"saved (only {', '.join(UNSEALED)} may be edited); restore it, or save the model again"
        )
    return entries, metadata[SEAL_TENSORS].split()
