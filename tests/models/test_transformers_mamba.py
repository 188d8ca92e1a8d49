"""Mamba and Falcon-Mamba of transformers: whole models with our float mixers, and quantized."""

from typing import Any

import pytest
import torch

from quamba import quantize
from quamba.models import find_adapter
from tests.tiny import install_float, make_model, token_ids

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "no conv bias": ("mamba", {}),
    "all biases": ("mamba-biased", {}),
    "untied": ("mamba", {"tie_word_embeddings": False}),
    "narrow residual": ("mamba-biased", {"residual_in_fp32": False}),
    "other sizes": ("mamba", {"expand": 3, "conv_kernel": 3, "state_size": 2, "time_step_rank": 7, "hidden_size": 20}),
    "falcon": ("falcon_mamba", {}),
    "falcon, biases": ("falcon_mamba", {"use_bias": True, "mixer_rms_eps": 1e-3, "layer_norm_epsilon": 1e-3}),
}


def make(variant: str, **options: Any) -> Any:
    family, changes = VARIANTS[variant]
    return make_model(family, **changes, **options)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_float_mixers_reproduce_the_logits(variant: str) -> None:
    model, ids = make(variant), token_ids(2, 17)
    expected = model(ids, output_hidden_states=True)
    found = install_float(model)(ids, output_hidden_states=True)
    assert found.logits.dtype == expected.logits.dtype
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["no conv bias", "untied", "falcon"])
def test_masked_batches_too(variant: str) -> None:
    model, ids = make(variant), token_ids(3, 9)
    mask = (torch.arange(9) >= torch.tensor([[0], [4], [8]])).long()
    expected = model(ids, attention_mask=mask).logits
    found = install_float(model)(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["all biases", "narrow residual", "falcon"])
def test_half_precision_is_no_worse(variant: str, dtype: torch.dtype) -> None:
    ids = token_ids(4, 17)
    theirs = ours = 0.0
    for seed in range(5):
        exact = make(variant, dtype=dtype, seed=seed).float()(ids).logits
        model = make(variant, dtype=dtype, seed=seed)
        theirs += float((model(ids).logits.float() - exact).square().sum() / exact.square().sum())
        found = install_float(model)(ids).logits
        ours += float((found.float() - exact).square().sum() / exact.square().sum())
    assert ours <= theirs


@torch.no_grad()
@pytest.mark.parametrize("variant", ["all biases", "untied", "falcon"])
def test_the_models_other_outputs_work_quantized(variant: str) -> None:
    model, ids = make(variant), token_ids(2, 9)
    quantize(model, [token_ids(4, 16, seed=1)])
    out = model(ids, labels=ids, output_hidden_states=True, use_cache=True)
    assert torch.isfinite(out.loss)
    assert len(out.hidden_states) == 4
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, out.logits[:, -1:])
    embedded = model.get_input_embeddings()(ids)
    assert embedded.dtype == torch.float32
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, out.logits)
    assert isinstance(model(ids, return_dict=False), tuple)
    # A new prompt with the cache that came back goes on where the old one ended.
    following = model(ids[:, :3], cache_params=out.cache_params, use_cache=True).logits
    full = model(torch.cat([ids, ids[:, :3]], dim=1)).logits[:, 9:]
    assert float((following - full).norm() / full.norm()) < 2e-2


@torch.no_grad()
def test_quantized_model_ignores_train_mode() -> None:
    model, ids = make("all biases"), token_ids(2, 9)
    quantize(model, [token_ids(4, 16, seed=1)])
    expected = model(ids, use_cache=False).logits
    model.train()
    assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_config_follows_the_model() -> None:
    model = make("falcon, biases")
    config = find_adapter(model).config(model, 1)
    assert (config.d_model, config.d_inner, config.d_state, config.d_conv, config.dt_rank) == (24, 48, 5, 4, 3)
    assert (config.norm_eps, config.dbc_eps, config.dbc_norm) == (1e-3, 1e-3, "weightless")
    assert (config.in_bias, config.out_bias, config.conv_bias) == (True, True, True)
    assert (config.residual, config.residual_in_fp32) == (True, True)
    # "auto" is resolved by the config: ceil(24 / 16).
    automatic = make_model("mamba", time_step_rank="auto", dtype=torch.bfloat16)
    assert find_adapter(automatic).config(automatic, 0).dt_rank == 2
    assert find_adapter(automatic).config(automatic, 0).dtype == torch.bfloat16
    assert find_adapter(automatic).tied(automatic)
    assert not find_adapter(make("untied")).tied(make("untied"))
