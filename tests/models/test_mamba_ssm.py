"""The mamba-ssm adapter, on a stand-in of the same names (the package itself needs a GPU)."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from quamba import quantize
from quamba.errors import UnsupportedModelError
from quamba.models import find_adapter
from quamba.models.mamba_ssm import MambaSsmAdapter, MambaSsmShell
from tests.models.mamba_ssm_stand_in import Block, InferenceParams, MambaConfig, MambaLMHeadModel, decode
from tests.tiny import install_float, randomize, token_ids

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"ssm_cfg": {"layer": "Mamba1", "bias": True, "d_conv": 3}},
    "untied": {"tie_embeddings": False, "ssm_cfg": {"conv_bias": False, "d_state": 7}},
    "narrow residual": {"residual_in_fp32": False},
}


def make(config: str = "plain", *, dtype: torch.dtype = torch.float32) -> MambaLMHeadModel:
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(**CONFIGS[config]))
    randomize(model, seed=0)
    return model.to(dtype).eval()


@torch.no_grad()
def logits(model: MambaLMHeadModel, ids: Tensor) -> Tensor:
    out: Tensor = model(ids).logits
    return out.float()


def close(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def full_greedy(model: MambaLMHeadModel, ids: Tensor, new_tokens: int) -> Tensor:
    for _ in range(new_tokens):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(dim=-1)], dim=1)
    return ids


@pytest.mark.parametrize("config", CONFIGS)
def test_float_mixers_reproduce_the_logits(config: str) -> None:
    model, ids = make(config), token_ids(2, 13)
    assert isinstance(find_adapter(model), MambaSsmAdapter)
    expected = logits(model, ids)
    install_float(model)
    assert all(isinstance(layer, MambaSsmShell) for layer in model.backbone.layers)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-4)
    assert find_adapter(model).layers(model) == [0, 1, 2]


def test_bfloat16_is_close() -> None:
    model, ids = make(dtype=torch.bfloat16), token_ids(2, 13)
    exact = logits(make(dtype=torch.bfloat16).float(), ids)
    theirs = logits(model, ids)
    assert close(logits(install_float(model), ids), exact) < 1.2 * close(theirs, exact)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("allocate", [False, True])
def test_float_generation_equals_full_passes(config: str, allocate: bool) -> None:
    model, ids = make(config), token_ids(3, 5)
    expected = full_greedy(model, ids, 9)
    assert torch.equal(decode(install_float(model), ids, 9, allocate=allocate), expected)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("recipe", ["naive", "quamba-c", "mamba-had", "dynamic"])
def test_quantized_model_stays_close_and_generates(config: str, recipe: str) -> None:
    model, ids = make(config), token_ids(3, 16)
    expected = logits(model, ids)
    assert quantize(model, [token_ids(8, 16, seed=1)], recipe) is model
    # Random layers amplify each other's errors; tests of the mixer hold the integers to account.
    assert close(logits(model, ids), expected) < 0.4
    prompt = ids[:, :5]
    assert torch.equal(decode(model, prompt, 9, allocate=True), decode(model, prompt, 9))
    assert torch.equal(decode(model, prompt, 9), full_greedy(model, prompt, 9))


@pytest.mark.parametrize("config", ["plain", "untied"])
def test_tied_weights_stay_tied(config: str) -> None:
    model = quantize(make(config), [token_ids(4, 16)])
    tables = [name for name in model.state_dict() if name.endswith("qweight") and "mixer" not in name]
    expected = ["backbone.embedding.qweight"] + (["lm_head.qweight"] if config == "untied" else [])
    assert tables == expected


def test_state_starts_anew_at_offset_zero() -> None:
    model, ids = install_float(make()), token_ids(2, 6)
    params = InferenceParams(max_seqlen=20, max_batch_size=2)
    with torch.no_grad():
        first = model(ids, inference_params=params).logits
        states = {layer: conv.data_ptr() for layer, (conv, _) in params.key_value_memory_dict.items()}
        second = model(ids, inference_params=params).logits
    assert torch.equal(first, second)
    assert states == {layer: conv.data_ptr() for layer, (conv, _) in params.key_value_memory_dict.items()}
    assert {tuple(conv.shape) for conv, _ in params.key_value_memory_dict.values()} == {(2, 48, 4)}
    assert {ssm.dtype for _, ssm in params.key_value_memory_dict.values()} == {torch.float32}


def test_padding_raises() -> None:
    model, ids = make(), token_ids(2, 6)
    adapter = find_adapter(model)
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert adapter.run_backbone(model, ids, mask).shape == (2, 6, 24)
    mask[0, 0] = False
    with pytest.raises(UnsupportedModelError, match=r"batch with padding.*unpadded"):
        adapter.run_backbone(model, ids, mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "found a mixer Mamba2 in layer 0; expected mamba_ssm's Mamba"),
        ({"d_intermediate": 8}, "found an MLP in layer 0"),
        ({"rms_norm": False}, "found a norm LayerNorm; expected RMSNorm"),
    ],
)
def test_other_layers_raise_and_leave_the_model(changes: dict[str, Any], message: str) -> None:
    model = MambaLMHeadModel(MambaConfig(**changes))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=message):
        quantize(model, [token_ids(2, 6)])
    assert all(isinstance(layer, Block) for layer in model.backbone.layers)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
