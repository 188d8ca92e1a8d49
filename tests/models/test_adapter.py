"""Finding the adapter of a model, and putting our mixers into it."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    FalconMambaModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaModel,
)

from quamba.errors import UnsupportedModelError
from quamba.models import ADAPTERS, Shell, find_adapter, quantized_layers
from quamba.models.adapter import register
from quamba.models.transformers_jamba import JambaAdapter
from quamba.models.transformers_mamba import MambaAdapter
from quamba.nn.mixer import Mixer
from tests.tiny import FAMILIES, install_float, make_model, token_ids

SMALL = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1}
OTHERS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_attention_heads=2, intermediate_size=8)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SMALL, num_attention_heads=2, intermediate_size=8)),
    "mamba2": lambda: Mamba2ForCausalLM(Mamba2Config(**SMALL, num_heads=4, head_dim=8, state_size=4, n_groups=1)),
    "Linear": lambda: nn.Linear(3, 3),
    "Sequential": lambda: nn.Sequential(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_raise_naming_the_type_and_what_is_supported(name: str) -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        find_adapter(OTHERS[name]())
    message = str(raised.value)
    assert f"found a model of type {name!r}" in message
    assert all(f"'{supported}'" in message for supported in ("mamba", "falcon_mamba", "jamba", "mamba_ssm"))


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_a_backbone_without_a_head_raises(family: str) -> None:
    backbone = make_model(family).backbone
    assert isinstance(backbone, (MambaModel, FalconMambaModel))
    with pytest.raises(UnsupportedModelError, match="expected the causal language model with its head"):
        find_adapter(backbone)


def test_a_model_without_mamba_layers_raises() -> None:
    model = make_model("jamba", attn_layer_period=1, attn_layer_offset=0)
    with pytest.raises(UnsupportedModelError, match="found JambaForCausalLM without Mamba layers"):
        find_adapter(model)


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_another_activation_raises(family: str) -> None:
    model = make_model(family, hidden_act="relu")
    with pytest.raises(UnsupportedModelError, match="found hidden_act 'relu'; expected 'silu'"):
        find_adapter(model).config(model, 0)


def test_the_adapters_of_the_families() -> None:
    found = [type(find_adapter(make_model(family))) for family in FAMILIES]
    assert found == [MambaAdapter, MambaAdapter, MambaAdapter, JambaAdapter]


def test_every_name_names_a_module(tiny_model: nn.Module) -> None:
    adapter = find_adapter(tiny_model)
    names = [adapter.embedding(tiny_model), adapter.head(tiny_model), adapter.final_norm(tiny_model)]
    for layer in adapter.layers(tiny_model):
        names += [adapter.module_name(layer), *adapter.absorbed(layer)]
    names += list(adapter.kept_float(tiny_model))
    assert all(isinstance(tiny_model.get_submodule(name), nn.Module) for name in names)
    assert all(reason for reason in adapter.kept_float(tiny_model).values())


def test_tensors_are_the_models_own(tiny_model: nn.Module) -> None:
    adapter = find_adapter(tiny_model)
    owned = {parameter.data_ptr() for parameter in tiny_model.parameters()}
    for layer in adapter.layers(tiny_model):
        tensors = adapter.tensors(tiny_model, layer)
        assert all(tensor.data_ptr() in owned for tensor in tensors.values())
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert shapes == adapter.config(tiny_model, layer).tensor_shapes()


@torch.no_grad()
def test_what_install_took_out_can_be_put_back(tiny_model: nn.Module) -> None:
    adapter, ids = find_adapter(tiny_model), token_ids(2, 5)
    expected = tiny_model(ids).logits
    before = dict(tiny_model.named_modules())
    for layer in adapter.layers(tiny_model):
        mixer = Mixer(adapter.config(tiny_model, layer), adapter.tensors(tiny_model, layer))
        old = adapter.install(tiny_model, layer, mixer)
        assert set(old) == {adapter.module_name(layer), *adapter.absorbed(layer)}
        assert isinstance(adapter.shell_at(tiny_model, layer), Shell)
        for name, module in old.items():
            parent, _, leaf = name.rpartition(".")
            setattr(tiny_model.get_submodule(parent), leaf, module)
        with pytest.raises(UnsupportedModelError, match="expected our shell"):
            adapter.shell_at(tiny_model, layer)
    assert dict(tiny_model.named_modules()) == before
    assert torch.equal(tiny_model(ids).logits, expected)


def test_quantized_layers_gives_our_mixers(tiny_model: nn.Module) -> None:
    install_float(tiny_model)
    found = dict(quantized_layers(find_adapter(tiny_model), tiny_model))
    assert list(found) == find_adapter(tiny_model).layers(tiny_model)
    assert all(isinstance(mixer, Mixer) and not mixer.training for mixer in found.values())


@torch.no_grad()
def test_the_backbone_alone_gives_what_the_head_reads(tiny_model: nn.Module) -> None:
    adapter, ids = find_adapter(tiny_model), token_ids(2, 9)
    mask = torch.arange(9) >= torch.tensor([[0], [4]])
    for given in (None, mask):
        hidden = adapter.run_backbone(tiny_model, ids, given)
        head = tiny_model.get_submodule(adapter.head(tiny_model))
        expected = tiny_model(ids, attention_mask=given).logits
        torch.testing.assert_close(head(hidden.to(adapter.dtype(tiny_model))).float(), expected)


def test_a_family_is_added_by_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quamba.models.adapter.ADAPTERS", dict(ADAPTERS))
    model = make_model("mamba")
    model.config.model_type = "mamba_cousin"
    with pytest.raises(UnsupportedModelError, match="'mamba_cousin'"):
        find_adapter(model)

    @register
    class CousinAdapter(MambaAdapter):
        model_types = ("mamba_cousin",)

    assert isinstance(find_adapter(model), CousinAdapter)
