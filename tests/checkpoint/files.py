"""Quantized tiny models, and ways to look into and change the checkpoints that they are saved to."""

import copy
import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

import quamba
from quamba.checkpoint import container, layout
from tests.tiny import make_model, token_ids


@cache
def _quantized(family: str, recipe: str, dtype: torch.dtype, keep: tuple[str, ...], seed: int) -> nn.Module:
    # torch's grouped product of half-precision experts wants rows of a multiple of 16 bytes.
    changes = {"intermediate_size": 40} if family == "jamba" else {}
    model = make_model(family, dtype=dtype, seed=seed, **changes)
    return quamba.quantize(model, [token_ids(2, 16)], recipe, keep=keep, progress=False)


def quantized(
    family: str = "mamba",
    recipe: str = "quamba",
    *,
    dtype: torch.dtype = torch.float32,
    keep: Iterable[str] = (),
    seed: int = 0,
) -> Any:
    """A quantized tiny model; the test may change it."""
    return copy.deepcopy(_quantized(family, recipe, dtype, tuple(keep), seed))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """(2, 13, V) of a fixed batch."""
    out: Tensor = model(token_ids(2, 13, seed=7)).logits
    return out


def contents(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, read by the safetensors library."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def metadata(path: Path) -> dict[str, str]:
    """The metadata of one file, read by the safetensors library."""
    with safe_open(path, framework="pt") as file:
        found: dict[str, str] = file.metadata()
    return found


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object], *, sealed: bool = True) -> None:
    """Change the tensors of an unsharded checkpoint, with fresh checksums or with the old ones."""
    path = directory / layout.WEIGHTS
    tensors, seal = contents(path), metadata(path)
    change(tensors)
    if sealed:
        seal = layout.seal(json.loads((directory / layout.CONFIG).read_text()), tensors)
    path.unlink()
    container.write(path, tensors, seal)


def rewrite_config(directory: Path, change: Callable[[dict[str, Any]], object], *, sealed: bool = True) -> None:
    """Change config.json, with a fresh checksum or with the old one."""
    path = directory / layout.CONFIG
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    if sealed:
        rewrite(directory, lambda tensors: None)


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    """The same tensors under the same names, and the same logits, bit for bit."""
    one, other = found.state_dict(), expected.state_dict()
    assert list(one) == list(other)
    for name, tensor in other.items():
        assert one[name].dtype == tensor.dtype
        assert torch.equal(one[name], tensor), name
    assert torch.equal(logits(found), logits(expected))
