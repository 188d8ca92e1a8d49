"""Models of mamba-ssm, whose config is no config of transformers."""

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quamba
from quamba.checkpoint import load, save
from quamba.errors import CheckpointError
from tests.checkpoint.files import assert_same, rewrite_config
from tests.tiny import VOCABULARY, token_ids


@dataclasses.dataclass
class MambaConfig:
    """Stands in for mamba_ssm's, with some of its fields."""

    d_model: int = 24
    n_layer: int = 2
    vocab_size: int = VOCABULARY
    ssm_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    tie_embeddings: bool = True


class Block(nn.Module):
    """Stands in for mamba_ssm's Block and the Mamba inside, as far as the adapter looks."""

    residual_in_fp32 = True
    mlp = None

    def __init__(self, width: int) -> None:
        super().__init__()

        class RMSNorm(nn.Module):
            eps = 1e-5

            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(width))

        self.norm = RMSNorm()
        self.mixer = mixer = nn.Module()
        inner, state, rank, kernel = 2 * width, 5, 3, 4
        for name, value in {
            "d_model": width,
            "d_inner": inner,
            "d_state": state,
            "d_conv": kernel,
            "dt_rank": rank,
        }.items():
            setattr(mixer, name, value)
        mixer.in_proj = nn.Linear(width, 2 * inner, bias=False)
        mixer.conv1d = nn.Conv1d(inner, inner, kernel, groups=inner, padding=kernel - 1)
        mixer.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        mixer.dt_proj = nn.Linear(rank, inner)
        # As in mamba_ssm, these two are float32 whatever the dtype of the model.
        mixer.A_log = nn.Parameter(torch.arange(1, state + 1).float().log().repeat(inner, 1))
        mixer.D = nn.Parameter(torch.ones(inner))
        mixer.out_proj = nn.Linear(inner, width, bias=False)


class MambaLMHeadModel(nn.Module):
    """Stands in for mamba_ssm's."""

    def __init__(self, config: MambaConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.config = config
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype or previous)
        try:
            with torch.device(device or "cpu"):
                self.backbone = nn.Module()
                self.backbone.embedding = nn.Embedding(config.vocab_size, config.d_model)
                self.backbone.layers = nn.ModuleList(Block(config.d_model) for _ in range(config.n_layer))
                self.backbone.norm_f = nn.RMSNorm(config.d_model)
                self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        finally:
            torch.set_default_dtype(previous)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        self.backbone.forward = self.run

    def run(self, ids: Tensor) -> Tensor:
        hidden, residual = self.backbone.embedding(ids), None
        for layer in self.backbone.layers:
            hidden, residual = layer(hidden, residual)
        return self.backbone.norm_f((hidden + residual).to(self.backbone.norm_f.weight.dtype))

    def forward(self, ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.lm_head(self.run(ids)))


@pytest.fixture
def _mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = ModuleType("config_mamba"), ModuleType("mixer_seq_simple")
    config.MambaConfig = MambaConfig  # type: ignore[attr-defined]
    model.MambaLMHeadModel = MambaLMHeadModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mamba_ssm", ModuleType("mamba_ssm"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.models", ModuleType("models"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.models.config_mamba", config)
    monkeypatch.setitem(sys.modules, "mamba_ssm.models.mixer_seq_simple", model)


@pytest.mark.usefixtures("_mamba_ssm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [(), ("layers.1",), ("head", "embedding")])
def test_models_of_mamba_ssm(tmp_path: Path, keep: tuple[str, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model: Any = MambaLMHeadModel(MambaConfig(), dtype=dtype)
    quamba.quantize(model, [token_ids(2, 16)], keep=keep, progress=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "mamba_ssm"
    assert config["d_model"] == 24
    found = load(tmp_path)
    assert_same(found, model)
    assert type(found) is MambaLMHeadModel
    assert found.config == model.config
    assert (found.lm_head.weight is found.backbone.embedding.weight) == ("head" in keep)
    other = load(tmp_path, dtype=torch.float16)
    assert other.backbone.norm_f.weight.dtype == torch.float16
    rewrite_config(tmp_path, lambda c: c.update(more=1))
    with pytest.raises(CheckpointError, match=r"config.json.*more"):
        load(tmp_path)


def test_models_of_mamba_ssm_need_mamba_ssm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("_mamba_ssm")
    model = quamba.quantize(MambaLMHeadModel(MambaConfig()), [token_ids(2, 16)], progress=False)
    save(model, tmp_path)
    for name in [name for name in sys.modules if name.startswith("mamba_ssm")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CheckpointError, match=r"config.json.*quamba\[mamba-ssm\]"):
        load(tmp_path)
