"""The named recipes (design, sections 1.4 and 1.5). A new recipe of existing steps is one entry in RECIPES."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from quamba.errors import RecipeError
from quamba.recipe import BLOCK_ACTIVATIONS, BLOCK_WEIGHTS, QuantSpec, Recipe, Step

_TENSOR = QuantSpec("tensor")
_CHANNEL = QuantSpec("channel")
_FEW_BITS = 4
_TOKEN = QuantSpec("token")
_ACTIVATIONS = dict.fromkeys((*BLOCK_ACTIVATIONS, "head.input"), _TENSOR)
_WEIGHTS = dict.fromkeys((*BLOCK_WEIGHTS, "head.weight", "embedding"), _CHANNEL)
# Small errors of x are carried along by the recurrence, so its rare large values are clipped (paper, section 4.2).
_CLIPPED = QuantSpec("tensor", "percentile", 0.99999)
_ROTATE = (Step("rotate_output"),)


def _recipe(name: str, steps: tuple[Step, ...] = (), **activations: QuantSpec | None) -> Recipe:
    return Recipe(name=name, activations={**_ACTIVATIONS, **activations}, weights=_WEIGHTS, steps=steps)


def _weights_per_tensor(recipe: Recipe, name: str) -> Recipe:
    """The same with one scale per weight."""
    return replace(recipe, name=name, weights=dict.fromkeys(_WEIGHTS, _TENSOR))


def _simulated(recipe: Recipe, name: str) -> Recipe:
    """The same with 4 bits in the blocks, in simulation; embedding and head keep their 8."""
    few = {site: spec and replace(spec, bits=_FEW_BITS) for site, spec in recipe.activations.items()}
    few_weights = {weight: spec and replace(spec, bits=_FEW_BITS) for weight, spec in recipe.weights.items()}
    ends = {"head.input": recipe.activations["head.input"]}
    end_weights = {weight: recipe.weights[weight] for weight in ("head.weight", "embedding")}
    return replace(recipe, name=name, activations={**few, **ends}, weights={**few_weights, **end_weights})


_NAIVE = _recipe("naive")
_QUAMBA = _recipe("quamba", _ROTATE, x=_CLIPPED)
_MAMBA_HAD = _recipe("mamba-had", (Step("rotate_residual"), Step("rotate_x"), *_ROTATE))

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe(
                name="float",
                activations=dict.fromkeys(_ACTIVATIONS),
                weights=dict.fromkeys(_WEIGHTS),
            ),
            _NAIVE,
            _weights_per_tensor(_NAIVE, "mamba-ptq"),
            _recipe("clip", x=_CLIPPED),
            _recipe("hadamard", _ROTATE),
            _QUAMBA,
            _weights_per_tensor(_QUAMBA, "quamba-tensor"),
            _simulated(_QUAMBA, "quamba-w4a4"),
            _recipe("quamba-o", _ROTATE, x=QuantSpec("tensor", "octav")),
            _recipe(
                "quamba-c",
                (Step("smooth_input", 0.7, reach=1.1), Step("smooth_output", 0.5), Step("smooth_head", 0.7), *_ROTATE),
                **dict.fromkeys(("u", "g", "head.input"), QuantSpec("tensor", "percentile", 0.9999)),
                **dict.fromkeys(("x0", "x"), QuantSpec("channel", headroom=1.1, vocabulary=True)),
                **dict.fromkeys(("z", "dt"), QuantSpec("channel", vocabulary=True)),
            ),
            _recipe("smoothquant", (Step("smooth_input", 0.5), Step("smooth_output", 0.5))),
            _MAMBA_HAD,
            _weights_per_tensor(_MAMBA_HAD, "mamba-had-tensor"),
            _simulated(_MAMBA_HAD, "mamba-had-w4a4"),
            _recipe(
                "dynamic",
                _ROTATE,
                **{"u": _TOKEN, "x": _TOKEN, "d": _TOKEN, "g": _TOKEN, "head.input": _TOKEN},
                **dict.fromkeys(("x0", "z", "dt", "B", "C")),
            ),
        )
    }
)
# A third of the plain method's error at the same cost (docs/recipes.md has the figures).
DEFAULT_RECIPE = "quamba-c"


def get_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by its name, or the recipe itself. Raises RecipeError for a name that does not exist."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise RecipeError(f"found recipe {recipe!r}; expected a Recipe or one of {sorted(RECIPES)}")
    return RECIPES[recipe]
