"""Jamba of transformers: our mixers among attention layers, MLPs and experts."""

from typing import Any

import pytest
import torch

from quamba import quantize
from quamba.models import find_adapter
from quamba.models.transformers_shell import TransformersShell
from quamba.nn.named import PassThrough
from quamba.nn.quantized_mixer import QuantizedMixer
from tests.tiny import install_float, make_model, token_ids

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"mamba_proj_bias": True, "mamba_conv_bias": True},
    "no conv bias": {"mamba_conv_bias": False, "rms_norm_eps": 1e-3},
    "tied": {"tie_word_embeddings": True},
    "no experts": {"num_experts": 1},
    "other sizes": {"mamba_expand": 3, "mamba_d_conv": 3, "mamba_d_state": 2, "mamba_dt_rank": 4},
}


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_float_mixers_reproduce_the_logits(variant: str) -> None:
    model, ids = make_model("jamba", **VARIANTS[variant]), token_ids(2, 17)
    options = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": variant != "no experts"}
    expected = model(ids, **options)
    found = install_float(model)(ids, **options)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)
    assert len(found.hidden_states) == len(expected.hidden_states) == 5
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    if variant != "no experts":
        assert len(found.router_logits) == len(expected.router_logits)
        for ours, theirs in zip(found.router_logits, expected.router_logits, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@torch.no_grad()
def test_masked_batches_too() -> None:
    model, ids = make_model("jamba"), token_ids(3, 9)
    mask = (torch.arange(9) >= torch.tensor([[0], [4], [8]])).long()
    expected = model(ids, attention_mask=mask).logits
    found = install_float(model)(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse(dtype: torch.dtype) -> None:
    ids = token_ids(4, 17)
    theirs = ours = 0.0
    for seed in range(8):
        # Without experts: which one a token goes to hangs on the last bit.
        exact = make_model("jamba", dtype=dtype, seed=seed, num_experts=1).float()(ids).logits
        model = make_model("jamba", dtype=dtype, seed=seed, num_experts=1)
        theirs += float((model(ids).logits.float() - exact).square().sum() / exact.square().sum())
        found = install_float(model)(ids).logits
        ours += float((found.float() - exact).square().sum() / exact.square().sum())
    assert ours <= theirs


def test_the_norm_before_the_mixer_is_absorbed_and_the_others_stay() -> None:
    model = make_model("jamba")
    adapter = find_adapter(model)
    norms = [model.get_submodule(f"model.layers.{i}.input_layernorm") for i in range(4)]
    assert adapter.layers(model) == [0, 1, 3]
    quantize(model, [token_ids(4, 16)])
    for i in (0, 1, 3):
        layer = model.get_submodule(f"model.layers.{i}")
        assert isinstance(layer.mamba, TransformersShell)
        assert isinstance(layer.mamba.mixer, QuantizedMixer)
        assert isinstance(layer.input_layernorm, PassThrough)
    assert model.get_submodule("model.layers.2.input_layernorm") is norms[2]


def test_what_stays_float_is_told_and_is_float() -> None:
    model = make_model("jamba")
    quantize(model, [token_ids(4, 16)])
    kept = find_adapter(model).kept_float(model)
    assert set(kept) == {
        "model.final_layernorm",
        "model.layers.2.input_layernorm",
        "model.layers.2.self_attn",
        *(f"model.layers.{i}.{part}" for i in range(4) for part in ("pre_ff_layernorm", "feed_forward")),
    }
    for name in kept:
        tensors = list(model.get_submodule(name).state_dict().values())
        assert tensors
        assert all(tensor.dtype == torch.float32 for tensor in tensors)
    # And nothing else is: every other parameter of the original is gone.
    others = [name for name, _ in model.named_parameters() if not name.startswith(tuple(kept))]
    assert others == []


@torch.no_grad()
def test_the_models_other_outputs_work_quantized() -> None:
    model, ids = make_model("jamba"), token_ids(2, 9)
    quantize(model, [token_ids(4, 16, seed=1)])
    out = model(ids, labels=ids, output_hidden_states=True, output_router_logits=True, use_cache=True)
    assert torch.isfinite(out.loss)
    assert torch.isfinite(out.aux_loss)
    assert len(out.hidden_states) == 5
    assert len(out.router_logits) == 2
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, out.logits[:, -1:])
