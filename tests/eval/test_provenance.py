"""Hashes and versions."""

import hashlib
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from quamba.eval import provenance
from tests.tiny import make_model


def test_model_hash_tells_every_change_of_a_tensor() -> None:
    model = make_model("mamba", dtype=torch.bfloat16)
    before = provenance.model_sha256(model)
    assert before == provenance.model_sha256(make_model("mamba", dtype=torch.bfloat16))
    for parameter in model.parameters():
        with torch.no_grad():
            old = parameter.flatten()[-1].clone()
            parameter.view(-1)[-1] = old + 1
            assert provenance.model_sha256(model) != before
            parameter.view(-1)[-1] = old
    assert provenance.model_sha256(model) == before
    assert provenance.model_sha256(model.float()) != before


def test_model_hash_is_the_one_of_the_docstring() -> None:
    model = nn.Linear(2, 3).double()
    digest = hashlib.sha256()
    for name, shape in (("bias", (3,)), ("weight", (3, 2))):
        digest.update(f"{name} torch.float64 {shape}\n".encode())
        digest.update(model.state_dict()[name].numpy().tobytes())
    assert provenance.model_sha256(model) == digest.hexdigest()


def test_hash_of_scalars_and_of_tensors_that_are_not_contiguous() -> None:
    model = nn.Module()
    model.register_buffer("scale", torch.tensor(0.5))
    model.register_buffer("table", torch.arange(6).view(2, 3).T)
    other = nn.Module()
    other.register_buffer("scale", torch.tensor(0.5))
    other.register_buffer("table", torch.arange(6).view(2, 3).T.contiguous())
    assert provenance.model_sha256(model) == provenance.model_sha256(other)


def test_file_hash(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    (tmp_path / "file").write_bytes(content)
    assert provenance.file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_versions_hardware_and_date() -> None:
    found = provenance.versions()
    assert found["torch"] == version("torch")
    assert {"python", "quamba", "transformers"} <= set(found)
    assert "threads" in provenance.hardware("cpu")
    assert abs(datetime.fromisoformat(provenance.now()).timestamp() - datetime.now().timestamp()) < 60
