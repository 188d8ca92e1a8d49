"""What inspection says against the model itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, JambaConfig, JambaForCausalLM, MambaConfig, MambaForCausalLM

import quamba
from quamba.errors import UnsupportedModelError
from quamba.inspect import SMALL, Inspection, inspect_model
from quamba.recipe import BLOCK_ACTIVATIONS


def mamba(*, tied: bool = True) -> Any:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=24, num_hidden_layers=3, state_size=4, tie_word_embeddings=tied)
    return MambaForCausalLM(config).to(torch.bfloat16)


def jamba() -> Any:
    torch.manual_seed(0)
    config = JambaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        mamba_d_state=4,
        mamba_dt_rank=3,
        num_experts=2,
        attn_layer_period=4,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
    )
    return JambaForCausalLM(config)


def data() -> list[torch.Tensor]:
    return [torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1))]


def state_bytes(model: Any) -> int:
    found = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values() if t.numel()}
    return sum(found.values())


def reasons(found: Inspection) -> dict[str, str]:
    return {entry.name: entry.reason for entry in found.kept_float}


@pytest.mark.parametrize("tied", [True, False])
def test_float_model(tied: bool) -> None:
    model = mamba(tied=tied)
    found = inspect_model(model)
    assert (found.model_type, found.recipe, found.sites) == ("mamba", None, ())
    sizes = {part.name: part for part in found.parts}
    assert sizes["embedding"].total == 64 * 24 * 2
    assert sizes["head"].total == (0 if tied else 64 * 24 * 2)
    assert sum(part.total for part in found.parts) == sum(part.other for part in found.parts) == state_bytes(model)
    assert [(entry.name, entry.bytes) for entry in found.kept_float] == [("*", state_bytes(model))]


@pytest.mark.parametrize("recipe", ["quamba", "quamba-c", "smoothquant", "dynamic", "mamba-had"])
@pytest.mark.parametrize("make", [mamba, jamba])
def test_sizes_add_up(recipe: str, make: Any) -> None:
    model = quamba.quantize(make(), data(), recipe)
    found = inspect_model(model)
    assert sum(part.total for part in found.parts) == state_bytes(model)
    tensors = model.state_dict()
    assert sum(p.int8 for p in found.parts) == sum(t.numel() for t in tensors.values() if t.dtype == torch.int8)
    # The float bytes and the reasons for them cover one another.
    assert sum(entry.bytes for entry in found.kept_float) == sum(part.other for part in found.parts)
    assert json.loads(json.dumps(found.to_dict()))["recipe"] == recipe


def test_sites_show_scales_and_statistics() -> None:
    model = quamba.quantize(mamba(), data(), "quamba-c")
    found = {site.address: site for site in inspect_model(model).sites}
    assert list(found) == [*(f"layers.{i}.{site}" for i in range(3) for site in BLOCK_ACTIVATIONS), "head.input"]
    buffers = dict(model.named_buffers())
    for address, name in {"layers.2.u": "layers.2.mixer.u_scale", "layers.1.x0": "layers.1.mixer.x0_scale"}.items():
        scale = buffers[f"backbone.{name}"]
        site, statistics = found[address], model.quantization.statistics[address]
        assert (site.scale_min, site.scale_max) == (float(scale.min()), float(scale.max()))
        assert (site.alpha, site.clipped, site.sqnr_db) == (statistics.alpha, statistics.clipped, statistics.sqnr_db)
    assert found["layers.1.x0"].granularity == "channel"
    assert found["layers.2.u"].granularity == "tensor"
    assert found["head.input"].scale_max == float(buffers["lm_head.input_scale"].max())


def test_scales_of_tokens_are_found_at_run_time() -> None:
    found = inspect_model(quamba.quantize(mamba(), None, "dynamic"))
    site = next(site for site in found.sites if site.address == "layers.0.g")
    assert (site.granularity, site.scale_min, site.alpha) == ("token", None, None)
    assert reasons(found)["layers.*.z"] == "the recipe 'dynamic' keeps it"
    assert "layers.0.z" not in {site.address for site in found.sites}


def test_what_was_kept_is_told_with_its_reason() -> None:
    keep = ["layers.1", "layers.*.x", "layers.2.in_proj", "layers.0.conv", "head"]
    model = quamba.quantize(mamba(), data(), keep=keep)
    found = inspect_model(model)
    sizes = {entry.name: entry.bytes for entry in found.kept_float}
    why = reasons(found)
    block = sum(t.numel() * 2 for name, t in mamba().state_dict().items() if name.startswith("backbone.layers.1."))
    assert sizes["layers.1"] == block
    assert why["layers.*.x"] == "kept by the override 'layers.*.x'"
    assert sizes["layers.2.in_proj"] == 2 * 48 * 24 * 2
    assert sizes["layers.0.conv"] == 48 * 4 * 2
    assert why["head.weight"] == "kept by the override 'head'"
    assert sizes["head.weight"] == 64 * 24 * 2
    assert SMALL in why.values()
    assert not {"layers.1.u", "layers.0.x", "head.input"} & {site.address for site in found.sites}
    assert sum(sizes.values()) == sum(part.other for part in found.parts)


def test_the_float_recipe_keeps_every_layer() -> None:
    found = inspect_model(quamba.quantize(mamba(), None, "float"))
    assert found.sites == ()
    assert reasons(found)["layers.*"] == "the recipe 'float' keeps it"
    assert sum(entry.bytes for entry in found.kept_float) == sum(part.other for part in found.parts)


def test_attention_and_experts_are_named() -> None:
    found = inspect_model(quamba.quantize(jamba(), data()))
    why = reasons(found)
    assert why["model.layers.*.self_attn"] == "attention stays in float"
    assert why["model.layers.*.feed_forward"] == "MLP and experts stay in float"
    assert {part.name for part in found.parts} >= {"embedding", "Mamba blocks", "model.layers.*.self_attn", "head"}


def test_a_reloaded_model_looks_the_same(tmp_path: Path) -> None:
    model = quamba.quantize(mamba(), data())
    model.save_pretrained(tmp_path / "model")
    assert inspect_model(quamba.load(tmp_path / "model")) == inspect_model(model)


def test_another_architecture_raises() -> None:
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        inspect_model(GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1)))
