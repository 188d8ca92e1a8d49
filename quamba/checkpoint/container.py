"""One safetensors file: written in order and durably, read with every offset checked before anything is allocated.

Reading copies the bytes out of the file (no memory map), so that what was checked is what is used, and a file that
is replaced or cut off later changes nothing.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from quamba.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

REMEDY = "the file is damaged: copy it again, or save the model again"
# The limit of the safetensors library.
_HEADER_LIMIT = 100_000_000


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its dtype code, its shape, and its bytes [begin, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, copied to the CPU where they are elsewhere."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names in the order of the bytes in a file."""
    # Wide elements first, so that every tensor is aligned; then by name, so that equal models give equal files.
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a new file and sync it to the disk.

    Args:
        path: must not exist.
        tensors: any dtype in DTYPES, any device; they are copied to the CPU one at a time.
        metadata: strings for the header's `__metadata__`.
    """
    names = order(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            file.write(raw(tensors[name]))
        file.flush()
        os.fsync(file.fileno())


def read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of an open file, in the order of the bytes, and its metadata.

    Raises:
        CheckpointError: the header is truncated, not JSON, or does not tile the file exactly.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _HEADER_LIMIT):
        raise CheckpointError(
            f"{path}: found a header length of {length} in a file of {size} bytes; expected it to fit; {REMEDY}"
        )
    header = parse_json(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: found a malformed __metadata__; expected an object of strings; {REMEDY}")
    found = [(name, _entry(name, value, start=8 + length, path=path)) for name, value in header.items()]
    entries = dict(sorted(found, key=lambda item: (item[1].begin, item[1].end)))
    end = 8 + length
    for name, entry in entries.items():
        if entry.begin != end:
            raise CheckpointError(
                f"{path}: tensor {name!r} begins at byte {entry.begin}; expected {end}, where the one before it ends; "
                f"{REMEDY}"
            )
        end = entry.end
    if end != size:
        raise CheckpointError(f"{path}: found {size} bytes; expected {end}, where the last tensor ends; {REMEDY}")
    return entries, metadata


def _entry(name: str, value: Any, *, start: int, path: Path) -> Entry:
    def natural(numbers: Any) -> bool:
        return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{path}: tensor {name!r} has a malformed header; expected dtype, shape and data_offsets; {REMEDY}"
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype!r}; expected one of {list(DTYPES)}; {REMEDY}")
    # Without a limit on dimensions and on empty tensors, a damaged shape could overflow inside torch.
    sane = natural(shape) and len(shape) <= 8 and (0 not in shape or shape == [0])
    if not sane or not natural(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: tensor {name!r} has a malformed shape or data_offsets; {REMEDY}")
    begin, end = offsets
    if end - begin != prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(
            f"{path}: tensor {name!r} has {end - begin} bytes; expected {dtype} of shape {shape}; {REMEDY}"
        )
    return Entry(dtype=dtype, shape=tuple(shape), begin=start + begin, end=start + end)


def read_tensors(file: BinaryIO, entries: Mapping[str, Entry], path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, CPU tensor) of an open file, in the order of the entries; each owns its memory.

    Raises:
        CheckpointError: the file ends too early.
    """
    for name, entry in entries.items():
        # The device is named because from_pretrained runs this under torch.device("meta").
        flat = torch.empty(entry.end - entry.begin, dtype=torch.uint8, device="cpu")
        file.seek(entry.begin)
        count = file.readinto(flat.numpy())  # type: ignore[attr-defined]
        if count != flat.numel():
            raise CheckpointError(
                f"{path}: the file ends inside tensor {name!r}: found {count} of its {flat.numel()} bytes; {REMEDY}"
            )
        yield name, flat.view(DTYPES[entry.dtype]).reshape(entry.shape)


def parse_json(data: bytes | str, path: Path) -> dict[str, Any]:
    """A JSON object without duplicate keys, from UTF-8 bytes or text.

    Raises:
        CheckpointError: the bytes are anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError(f"a key occurs twice among {sorted(key for key, _ in pairs)}")
        return found

    try:
        found = json.loads(data if isinstance(data, str) else data.decode("utf-8"), object_pairs_hook=unique)
    # RecursionError: brackets nested thousands deep.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: found text that is not JSON ({error}); expected a JSON object; {REMEDY}"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: found a JSON {type(found).__name__}; expected a JSON object; {REMEDY}")
    return found
