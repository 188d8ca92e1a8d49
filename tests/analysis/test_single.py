"""One tensor taken out of a recipe."""

from dataclasses import replace

from quamba.analysis.single import BLOCK_TENSORS, quantized_alike, single_tensor_format
from quamba.analysis.study import Study, opened, study
from quamba.recipe import Override, QuantSpec, Recipe
from quamba.recipes import RECIPES
from tests.tiny import make_model, token_ids


def test_a_format_of_one_tensor() -> None:
    format = RECIPES["quamba-c"].block(0)
    alone = single_tensor_format(format, "B")
    assert alone is not None
    assert alone.steps == format.steps
    quantized = {k for k, v in (*alone.activations.items(), *alone.weights.items()) if v is not None}
    assert quantized == {"B"}
    assert single_tensor_format(RECIPES["dynamic"].block(0), "B") is None


def studies(*recipes: Recipe) -> list[Study]:
    with opened(make_model("mamba")) as model:
        return [study(model, recipe, [token_ids(4, 9)]) for recipe in recipes]


def test_recipes_that_treat_a_tensor_alike() -> None:
    clipped = replace(RECIPES["naive"], overrides=(Override("layers.2.C", QuantSpec("channel")),))
    naive, hadamard, other = studies(RECIPES["naive"], RECIPES["hadamard"], clipped)
    same = {name for name in (*BLOCK_TENSORS, "head.weight") if quantized_alike(naive, hadamard, name)}
    assert same == {*BLOCK_TENSORS, "head.weight"} - {"g", "out_proj"}
    assert not quantized_alike(naive, other, "C")
    assert quantized_alike(naive, other, "B")
