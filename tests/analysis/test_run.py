"""The whole analysis on tiny models."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import quamba
from quamba.analysis.run import Settings, analyze
from quamba.analysis.single import TENSORS
from quamba.errors import CalibrationError, RecipeError
from quamba.eval.perplexity import compare
from quamba.recipe import Override, Recipe
from quamba.recipes import RECIPES
from tests.tiny import make_model, token_ids

SMALL = Settings(
    context=12, calibration_sequences=3, windows=4, sequences=2, long_context=20, long_sequences=2, batch_size=3
)


def test_all_of_it(tiny_model: nn.Module) -> None:
    calibration, evaluation = token_ids(50), token_ids(60, seed=1)
    modules = dict(tiny_model.named_modules())
    found = analyze(tiny_model, calibration, evaluation, settings=SMALL, progress=False)
    assert dict(tiny_model.named_modules()) == modules
    names = {recipe: [c.name for c in found.costs if c.recipe == recipe] for recipe in ("naive", "quamba-c")}
    assert names["naive"] == [*TENSORS, "all"]
    # y belongs to no recipe, and is measured once.
    assert names["quamba-c"] == [name for name in (*TENSORS, "all") if name != "y"]
    assert [errors.recipe for errors in found.errors] == ["naive", "quamba-c"]
    assert found.positions.names == ("naive", "quamba-c")
    assert found.positions.kl.shape == (2, 20)
    assert found.decay.largest.shape[1] == 12
    assert found.about["evaluation_tokens"] == 48
    assert found.about["calibration_tokens"] == 36
    costs = {(cost.recipe, cost.name): cost for cost in found.costs}
    # d is quantized alike in both recipes, g is not.
    assert costs["naive", "d"].kl == costs["quamba-c", "d"].kl
    assert costs["naive", "g"].kl != costs["quamba-c", "g"].kl


def test_the_whole_recipe_is_quantize() -> None:
    calibration, evaluation = token_ids(40), token_ids(60, seed=1)
    found = analyze(make_model("mamba"), calibration, evaluation, settings=SMALL, progress=False)
    whole = next(cost for cost in found.costs if (cost.recipe, cost.name) == ("naive", "all"))
    quantized = quamba.quantize(
        make_model("mamba"), [calibration[torch.tensor([0, 14, 28])[:, None] + torch.arange(12)]], "naive"
    )
    expected = compare(quantized, make_model("mamba"), evaluation[:48], context=12, progress=False)
    assert whole.kl == pytest.approx(expected.kl, rel=1e-3)


def test_recipes_of_ones_own() -> None:
    mine = replace(RECIPES["clip"], name="mine").with_overrides([Override("layers.*.x"), Override("head")])
    found = analyze(make_model("mamba"), token_ids(40), token_ids(60, seed=1), recipes=[mine], settings=SMALL)
    names = [cost.name for cost in found.costs]
    assert names == [name for name in (*TENSORS, "all") if name not in ("x", "head.input", "head.weight")]
    assert Recipe.from_dict(found.about["recipes"][0]) == mine
    for recipes in ([], [mine, mine]):
        with pytest.raises(RecipeError, match="each with its own name"):
            analyze(make_model("mamba"), token_ids(40), token_ids(60), recipes=recipes, settings=SMALL)


def test_the_text_has_to_suffice_for_both_lengths() -> None:
    assert SMALL.evaluation_tokens == 48
    assert Settings(long_context=2048, long_sequences=9).evaluation_tokens == 2048 * 12


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(CalibrationError, match="at least 48"):
        analyze(make_model("mamba"), token_ids(40), token_ids(47), settings=SMALL)
    with pytest.raises(CalibrationError, match="at least one window"):
        analyze(make_model("mamba"), token_ids(11), token_ids(60), settings=SMALL)
