"""Smoothing: divisors from what calibration has seen."""

from dataclasses import replace

import pytest
import torch

from quamba import smoothing
from quamba.models import find_adapter
from quamba.observation import Statistics
from quamba.recipe import Override, QuantSpec, Step
from quamba.recipes import RECIPES
from tests.tiny import make_model, mixers_of


def test_smoothing_looks_at_channels_where_its_site_is_quantized() -> None:
    recipe = RECIPES["quamba-c"].with_overrides([Override("layers.1.g")])
    sites = {"layers.0.u", "layers.0.g", "layers.1.u", "head.input"}
    assert set(smoothing.smoothing_plan(recipe, [0, 1])) == sites
    assert "head.input" not in smoothing.smoothing_plan(recipe.with_overrides([Override("head.weight")]), [0])
    assert smoothing.smoothing_plan(RECIPES["quamba"], [0]) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_divisors_are_exact_in_the_models_dtype(dtype: torch.dtype) -> None:
    mixers = mixers_of("mamba", dtype)
    recipe = RECIPES["quamba-c"]
    statistics = Statistics()
    for address, spec in smoothing.smoothing_plan(recipe, mixers).items():
        width = 24 if address.endswith(".u") else mixers[0].config.d_inner
        statistics.update(address, spec, torch.randn(50, width) * torch.logspace(-3, 3, width))
    for layer, transforms in smoothing.find_transforms(recipe, mixers, statistics).items():
        gamma = mixers[layer].tensors()["norm.weight"].float()
        assert transforms.u_divisor is not None
        assert transforms.g_divisor is not None
        folded = gamma / transforms.u_divisor
        torch.testing.assert_close(folded.to(dtype).float(), folded, rtol=2e-7, atol=0)
        assert torch.equal(transforms.g_divisor.to(dtype).float(), transforms.g_divisor)
        assert bool((transforms.g_divisor > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_channels_beyond_reach_are_divided_until_they_are_within(dtype: torch.dtype) -> None:
    mixers = mixers_of("mamba", dtype)
    recipe = replace(RECIPES["naive"], steps=(Step("smooth_input", 0.5, reach=2.0),))
    statistics = Statistics()
    magnitudes = torch.rand(24, generator=torch.Generator().manual_seed(1)) + 0.5
    for layer in mixers:
        statistics.update(f"layers.{layer}.u", QuantSpec("channel"), magnitudes[None])
    before = smoothing.find_transforms(recipe, mixers, statistics)
    # The third block's clip is above every channel; there, and for channels within reach, nothing changes.
    alphas = {"layers.0.u": torch.tensor(0.4), "layers.1.u": torch.tensor(0.6), "layers.2.u": torch.tensor(1e3)}
    after = smoothing.reach_channels(recipe, mixers, before, statistics=statistics, alphas=alphas)
    for layer, mixer in mixers.items():
        old, new, limit = before[layer].u_divisor, after[layer].u_divisor, 2 * alphas[f"layers.{layer}.u"]
        assert old is not None
        assert new is not None
        over = magnitudes / old > limit
        assert bool(over.any()) == (layer < 2)
        assert torch.equal(new[~over], old[~over])
        # To the dtype in which norm.weight / divisor is stored.
        torch.testing.assert_close((magnitudes / new)[over], limit.expand(24)[over], rtol=8e-3, atol=0)
        folded = mixer.tensors()["norm.weight"].float() / new
        torch.testing.assert_close(folded.to(dtype).float(), folded, rtol=2e-7, atol=0)

    for steps, known in (((Step("smooth_input", 0.5),), alphas), (recipe.steps, {})):
        other = replace(recipe, steps=steps)
        kept = smoothing.reach_channels(other, mixers, before, statistics=statistics, alphas=known)
        assert all(kept[layer] is before[layer] for layer in mixers)


@pytest.mark.parametrize("tied", [True, False])
def test_the_heads_divisor_is_smoothquants_and_bounded_where_tied(tied: bool) -> None:
    model = make_model("mamba", tie_word_embeddings=tied)
    adapter = find_adapter(model)
    weight = model.get_submodule(adapter.head(model)).weight.detach()
    magnitudes = torch.logspace(-4, 4, weight.shape[1])
    statistics = Statistics()
    statistics.update("head.input", QuantSpec("channel"), torch.stack([magnitudes, -magnitudes / 2]))
    recipe = replace(RECIPES["naive"], steps=(Step("smooth_head", 0.3),))
    divisor = smoothing.find_head_divisor(recipe, model=model, adapter=adapter, statistics=statistics)
    free = magnitudes**0.3 / weight.abs().amax(dim=0) ** 0.7
    expected = free / free.log().mean().exp()
    assert divisor is not None
    torch.testing.assert_close(divisor, expected.clamp(0.5, 2) if tied else expected)
    kept = recipe.with_overrides([Override("head")])
    assert smoothing.find_head_divisor(kept, model=model, adapter=adapter, statistics=statistics) is None
