"""The named recipes: what design promises of each."""

from dataclasses import replace

import pytest

from quamba.errors import RecipeError
from quamba.recipe import BLOCK_ACTIVATIONS, MODEL_ADDRESSES, QuantSpec, Recipe, Step
from quamba.recipes import DEFAULT_RECIPE, RECIPES, get_recipe

NAMES = ["float", "naive", "clip", "hadamard", "quamba", "quamba-o", "quamba-c", "smoothquant", "mamba-had", "dynamic"]
PER_TENSOR = {"mamba-ptq": "naive", "quamba-tensor": "quamba", "mamba-had-tensor": "mamba-had"}
SIMULATED = {"quamba-w4a4": "quamba", "mamba-had-w4a4": "mamba-had"}
ROTATE = Step("rotate_output")


def test_every_promised_recipe_is_there_under_its_name() -> None:
    assert {*NAMES, *PER_TENSOR, *SIMULATED} <= set(RECIPES)
    assert all(recipe.name == name for name, recipe in RECIPES.items())
    assert DEFAULT_RECIPE in RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json_and_holds_for_any_layer(name: str) -> None:
    recipe = RECIPES[name]
    assert Recipe.from_json(recipe.to_json()) == recipe
    recipe.check([0, 1])
    assert recipe.block(0).activations.keys() == set(BLOCK_ACTIVATIONS)
    assert recipe.block(0) == recipe.block(63)


@pytest.mark.parametrize("name", NAMES[1:])
def test_weights_are_int8_per_channel(name: str) -> None:
    assert set(RECIPES[name].weights.values()) == {QuantSpec("channel")}


@pytest.mark.parametrize("name", PER_TENSOR)
def test_variants_with_one_scale_per_weight(name: str) -> None:
    recipe, base = RECIPES[name], RECIPES[PER_TENSOR[name]]
    assert set(recipe.weights.values()) == {QuantSpec("tensor")}
    assert (recipe.activations, recipe.steps) == (base.activations, base.steps)


@pytest.mark.parametrize("name", RECIPES)
def test_only_the_w4a4_recipes_are_simulations(name: str) -> None:
    assert RECIPES[name].simulated == (name in SIMULATED)
    assert RECIPES[name].label == (f"{name} (simulation)" if name in SIMULATED else name)


@pytest.mark.parametrize("name", SIMULATED)
def test_w4a4_is_its_recipe_in_4_bits_between_ends_of_8(name: str) -> None:
    recipe, base = RECIPES[name], RECIPES[SIMULATED[name]]
    assert recipe.steps == base.steps
    for found, expected in ((recipe.activations, base.activations), (recipe.weights, base.weights)):
        assert {s: spec.bits for s, spec in found.items()} == {s: 8 if s in MODEL_ADDRESSES else 4 for s in found}
        assert {s: replace(spec, bits=8) for s, spec in found.items()} == expected


def test_float_quantizes_nothing() -> None:
    recipe = RECIPES["float"]
    assert recipe.block(5).is_float
    assert all(recipe.spec(address) is None for address in MODEL_ADDRESSES)


@pytest.mark.parametrize("name", ["naive", "clip", "hadamard", "quamba", "quamba-o", "smoothquant", "mamba-had"])
def test_scales_per_tensor(name: str) -> None:
    assert {spec.granularity for spec in RECIPES[name].activations.values() if spec} == {"tensor"}


def test_what_tells_the_recipes_apart() -> None:
    clipped = RECIPES["clip"].activations["x"]
    assert clipped is not None
    assert clipped.observer == "percentile"
    assert RECIPES["quamba"].activations["x"] == clipped
    assert RECIPES["quamba-o"].activations["x"] == QuantSpec("tensor", "octav")
    assert RECIPES["hadamard"].activations["x"] == RECIPES["naive"].activations["x"] == QuantSpec()
    assert RECIPES["naive"].steps == RECIPES["clip"].steps == ()
    for name in ("hadamard", "quamba", "quamba-o", "quamba-c", "mamba-had", "dynamic"):
        assert ROTATE in RECIPES[name].steps
    assert {step.name for step in RECIPES["smoothquant"].steps} == {"smooth_input", "smooth_output"}
    assert {step.alpha for step in RECIPES["smoothquant"].steps} == {0.5}
    assert {"rotate_residual", "rotate_x"} <= {step.name for step in RECIPES["mamba-had"].steps}
    channels = {
        site for site, spec in RECIPES["quamba-c"].activations.items() if spec and spec.granularity == "channel"
    }
    assert channels == {"x0", "z", "x", "dt"}
    specs = RECIPES["quamba-c"].activations
    # What goes into a matrix product is clipped, what comes out of the convolution's neighbourhood has room.
    assert {site for site, spec in specs.items() if spec and spec.percentile == 0.9999} == {"u", "g", "head.input"}
    assert {site for site, spec in specs.items() if spec and spec.headroom == 1.1} == {"x0", "x"}
    # Their scales cover what rare tokens do to them, which costs nothing where other channels are larger anyway.
    assert {site for site, spec in specs.items() if spec and spec.vocabulary} == {"x0", "z", "x", "dt"}
    reaches = {name: [step.reach for step in recipe.steps if step.reach] for name, recipe in RECIPES.items()}
    assert {name: found for name, found in reaches.items() if found} == {"quamba-c": [1.1]}
    tokens = {spec.granularity for spec in RECIPES["dynamic"].activations.values() if spec}
    assert tokens == {"token"}


def test_get_recipe() -> None:
    assert get_recipe("naive") is RECIPES["naive"]
    own = Recipe(name="own", activations=RECIPES["naive"].activations, weights=RECIPES["naive"].weights)
    assert get_recipe(own) is own
    with pytest.raises(RecipeError, match=r"found recipe 'int8'; expected a Recipe or one of \['clip'"):
        get_recipe("int8")
