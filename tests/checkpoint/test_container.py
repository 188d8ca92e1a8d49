"""One safetensors file: the safetensors library reads what we write, and damage is found before any allocation."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from quamba.checkpoint import container
from quamba.errors import CheckpointError

TENSORS = {
    "scalar": torch.tensor(1.5),
    "bytes": torch.arange(-3, 4, dtype=torch.int8),
    "strided": torch.arange(12, dtype=torch.float32).reshape(3, 4).T[1:],
    "half": torch.tensor([[0.1, -0.0]], dtype=torch.float16),
    "brain": torch.tensor([3.0, float("nan")], dtype=torch.bfloat16),
    "wide": torch.tensor([1e300], dtype=torch.float64),
    "empty": torch.empty(0, dtype=torch.uint8),
    "näme ☂": torch.tensor([True, False]),
}


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with path.open("rb") as file:
        entries, metadata = container.read_header(file, path)
        return dict(container.read_tensors(file, entries, path)), metadata


def write_header(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bytes(container.raw(one)) == bytes(container.raw(other))
    )


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    container.write(path, TENSORS, {"format": "pt", "key": 'a "quoted" value'})
    found = safetensors.torch.load_file(path)
    assert set(found) == set(TENSORS)
    assert all(same(found[name], TENSORS[name]) for name in TENSORS)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "key": 'a "quoted" value'}


def test_we_read_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    contiguous = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    safetensors.torch.save_file(contiguous, path, {"a": "b"})
    found, metadata = read(path)
    assert metadata == {"a": "b"}
    assert all(same(found[name], TENSORS[name]) for name in TENSORS)


def test_equal_tensors_give_equal_bytes_whatever_their_order(tmp_path: Path) -> None:
    one, other = tmp_path / "1", tmp_path / "2"
    container.write(one, TENSORS, {"a": "b"})
    container.write(other, dict(reversed(TENSORS.items())), {"a": "b"})
    assert one.read_bytes() == other.read_bytes()
    with pytest.raises(FileExistsError):
        container.write(one, TENSORS, {})


def test_what_was_read_does_not_depend_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    container.write(path, {"a": torch.ones(100)}, {})
    tensor = read(path)[0]["a"]
    path.write_bytes(b"")
    assert torch.equal(tensor, torch.ones(100))


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "expected a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        ({"__metadata__": {"a": 1}}, "__metadata__"),
        ({"__metadata__": "a"}, "__metadata__"),
        ({"a": 1}, "malformed header"),
        ({"a": {**ENTRY, "more": 1}}, "malformed header"),
        ({"a": {**ENTRY, "dtype": "F31"}}, "dtype 'F31'"),
        ({"a": {**ENTRY, "dtype": ["F32"]}}, "dtype"),
        ({"a": {**ENTRY, "shape": [-2]}}, "shape"),
        ({"a": {**ENTRY, "shape": [True, 2]}}, "shape"),
        ({"a": {**ENTRY, "shape": [2.0]}}, "shape"),
        ({"a": {**ENTRY, "shape": [1] * 9 + [2]}}, "shape"),
        ({"a": {"dtype": "F32", "shape": [0, 10**30], "data_offsets": [0, 0]}}, "shape"),
        ({"a": {**ENTRY, "shape": [10**30]}}, "has 8 bytes"),
        ({"a": {**ENTRY, "data_offsets": [0, 8, 8]}}, "data_offsets"),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, "-8 bytes"),
        ({"a": {**ENTRY, "data_offsets": [8, 16]}}, "begins at byte"),
        ({"a": ENTRY, "b": ENTRY}, "begins at byte"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 16]}}, "expected"),
        ({}, "bytes; expected"),
    ],
)
def test_malformed_headers_raise(tmp_path: Path, header: object, message: str) -> None:
    path = tmp_path / "x.safetensors"
    write_header(path, header, bytes(8))
    with pytest.raises(CheckpointError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("length", [3, 2**40, 2**64 - 1])
def test_a_header_length_beyond_the_file_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="header length"):
        read(path)


@pytest.mark.parametrize("size", range(0, 200, 7))
def test_truncated_files_raise(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    container.write(path, {"a": torch.ones(16), "b": torch.ones(3)}, {"format": "pt"})
    whole = path.read_bytes()
    assert size < len(whole)
    path.write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match=str(path)):
        read(path)


def test_a_file_that_shrinks_while_it_is_read_raises(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    container.write(path, {"a": torch.ones(5000)}, {})
    with path.open("rb") as file:
        entries, _ = container.read_header(file, path)
        with path.open("r+b") as other:
            other.truncate(9000)
        with pytest.raises(CheckpointError, match="ends inside tensor 'a'"):
            list(container.read_tensors(file, entries, path))
