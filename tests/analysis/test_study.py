"""Opening a model leaves it as it was; a study finds what calibration finds."""

import pytest
import torch
from torch import nn

import quamba
from quamba.analysis.study import opened, replaced, study, watch_scans
from quamba.data import Batch
from quamba.errors import CalibrationError, RecipeError, UnsupportedModelError
from quamba.recipes import RECIPES
from tests.tiny import make_model, token_ids


@torch.no_grad()
def test_the_model_is_as_it_was_afterwards(tiny_model: nn.Module) -> None:
    ids = token_ids(2, 7)
    before, modules = tiny_model(ids).logits, dict(tiny_model.named_modules())
    tiny_model.train()
    with opened(tiny_model) as found:
        assert not tiny_model.training
        assert found.layers == tuple(found.adapter.layers(tiny_model))
        torch.testing.assert_close(tiny_model(ids).logits, before, rtol=1e-4, atol=1e-4)
    assert tiny_model.training
    after = dict(tiny_model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is module for name, module in modules.items())


def test_the_model_is_as_it_was_after_an_error() -> None:
    model = make_model("mamba")
    modules = dict(model.named_modules())
    with pytest.raises(ZeroDivisionError), opened(model):
        raise ZeroDivisionError
    assert dict(model.named_modules()) == modules


def test_a_quantized_model_is_refused() -> None:
    model = quamba.quantize(make_model("mamba"), None, "dynamic")
    with pytest.raises(UnsupportedModelError, match="already"), opened(model):
        pass


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_scales_are_those_of_quantize(family: str) -> None:
    data = [token_ids(4, 11, seed=1), token_ids(3, 11, seed=2)]
    with opened(make_model(family)) as model:
        found = study(model, RECIPES["quamba-c"], data)
    expected = quamba.quantize(make_model(family), data, "quamba-c")
    for address, statistics in expected.quantization.statistics.items():
        assert float(found.alphas[address].max()) == statistics.alpha
    assert found.alphas.keys() == expected.quantization.statistics.keys()


@torch.no_grad()
def test_the_range_of_y_is_the_largest_of_all_batches() -> None:
    data = [token_ids(4, 11, seed=1), token_ids(3, 11, seed=2)]
    with opened(make_model("mamba")) as model:
        found = study(model, RECIPES["naive"], data)
        scans = list(watch_scans(model, [Batch(ids, None) for ids in data]))
        for layer in model.layers:
            assert float(found.y_alphas[layer]) == max(float(s[layer].y.abs().max()) for s in scans)
        assert all(mixer.transforms.g_divisor is None for mixer in model.mixers.values())


def test_a_rotated_residual_is_refused() -> None:
    with opened(make_model("mamba")) as model, pytest.raises(RecipeError, match="residual"):
        study(model, RECIPES["mamba-had"], [token_ids(2, 5)])


def test_padding_is_refused() -> None:
    data = [{"input_ids": token_ids(2, 5), "attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])}]
    with opened(make_model("mamba")) as model, pytest.raises(CalibrationError, match="padded"):
        study(model, RECIPES["naive"], data)


@torch.no_grad()
def test_what_is_replaced_comes_back() -> None:
    ids = token_ids(1, 6)
    with opened(make_model("mamba")) as model:
        before = model.model(ids).logits
        with replaced(model, {1: nn.Identity()}, {"lm_head": model.model.lm_head}):
            shell = model.adapter.shell_at(model.model, 1)
            assert isinstance(shell.mixer, nn.Identity)
        assert shell.mixer is model.mixers[1]
        assert torch.equal(model.model(ids).logits, before)
