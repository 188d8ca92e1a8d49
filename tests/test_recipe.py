"""Recipes as data: JSON round trip, globs, and an error for everything malformed."""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quamba.errors import RecipeError
from quamba.recipe import (
    BLOCK_ACTIVATIONS,
    BLOCK_WEIGHTS,
    MODEL_ADDRESSES,
    Override,
    QuantSpec,
    Recipe,
    Step,
)

ACTIVATIONS = (*BLOCK_ACTIVATIONS, "head.input")
WEIGHTS = (*BLOCK_WEIGHTS, "head.weight", "embedding")
PERCENTILE = QuantSpec("tensor", "percentile", 0.999)


def make_recipe(**changes: Any) -> Recipe:
    parts: dict[str, Any] = {
        "name": "mine",
        "activations": dict.fromkeys(ACTIVATIONS, QuantSpec()),
        "weights": dict.fromkeys(WEIGHTS, QuantSpec("channel")),
    }
    return Recipe(**(parts | changes))


def with_override(pattern: str, spec: QuantSpec | None) -> Recipe:
    return make_recipe().with_overrides([Override(pattern, spec)])


# Specs that every activation (or weight) takes.
activation_specs = st.one_of(
    st.none(),
    st.just(QuantSpec()),
    st.floats(0.5, 1.0, exclude_min=True).map(lambda p: QuantSpec("tensor", "percentile", p)),
    st.just(QuantSpec("tensor", "octav")),
)
weight_specs = st.sampled_from([None, QuantSpec(), QuantSpec("channel")])
steps = st.one_of(
    st.sampled_from(["rotate_output", "rotate_x", "rotate_residual"]).map(Step),
    st.tuples(st.sampled_from(["smooth_input", "smooth_output"]), st.floats(0.0, 1.0)).map(lambda s: Step(*s)),
    st.builds(Step, st.just("smooth_input"), st.floats(0.0, 1.0), st.floats(1.0, 16.0)),
)
overrides = st.builds(
    Override,
    pattern=st.sampled_from(["layers.*.x", "layers.0", "layers.1.u", "head", "embedding", "*.dt"])
    | st.text(max_size=12),
    spec=activation_specs,
)
recipes = st.builds(
    Recipe,
    name=st.text(max_size=20),
    activations=st.fixed_dictionaries(dict.fromkeys(ACTIVATIONS, activation_specs)),
    weights=st.fixed_dictionaries(dict.fromkeys(WEIGHTS, weight_specs)),
    steps=st.lists(steps, max_size=4).map(tuple),
    overrides=st.lists(overrides, max_size=4).map(tuple),
)


@settings(deadline=None, max_examples=60)
@given(recipe=recipes)
def test_json_round_trip(recipe: Recipe) -> None:
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert copy.deepcopy(recipe) == recipe


def test_the_json_is_plain_data() -> None:
    data = make_recipe(steps=(Step("smooth_input", 0.25),), overrides=(Override("head"),)).to_dict()
    assert data["steps"] == [{"name": "smooth_input", "alpha": 0.25, "reach": None}]
    assert data["overrides"] == [{"pattern": "head", "spec": None}]
    spec = {"granularity": "tensor", "observer": "absmax", "percentile": None, "bits": 8, "headroom": 1.0}
    assert data["activations"]["x"] == {**spec, "vocabulary": False}


def _edited(edit: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    data = make_recipe(steps=(Step("rotate_x"),), overrides=(Override("head", PERCENTILE),)).to_dict()
    edit(data)
    return data


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "surplus key": lambda d: d.update(colour="red"),
    "surplus key in a spec": lambda d: d["activations"]["x"].update(zero_point=3),
    "surplus key in a step": lambda d: d["steps"][0].update(size=3),
    "surplus key in an override": lambda d: d["overrides"][0].update(glob="x"),
    "surplus key in an override's spec": lambda d: d["overrides"][0]["spec"].update(glob="x"),
    "surplus site": lambda d: d["activations"].update(y=None),
    "surplus weight": lambda d: d["weights"].update(conv2=None),
    "missing name": lambda d: d.pop("name"),
    "missing activations": lambda d: d.pop("activations"),
    "missing site": lambda d: d["activations"].pop("x"),
    "missing weight": lambda d: d["weights"].pop("embedding"),
    "missing step name": lambda d: d["steps"][0].pop("name"),
    "missing pattern": lambda d: d["overrides"][0].pop("pattern"),
    "activations a list": lambda d: d.update(activations=["x"]),
    "steps a number": lambda d: d.update(steps=3),
    "steps names": lambda d: d.update(steps=["rotate_x"]),
    "overrides an object": lambda d: d.update(overrides={"head": None}),
    "spec text": lambda d: d["activations"].update(x="int8"),
    "spec a number": lambda d: d["weights"].update(conv=8),
    "granularity": lambda d: d["activations"]["x"].update(granularity="row"),
    "granularity a list": lambda d: d["activations"]["x"].update(granularity=["tensor"]),
    "percentile text": lambda d: d["overrides"][0]["spec"].update(percentile="0.9"),
    "bits": lambda d: d["weights"]["conv"].update(bits=9),
    "bits of an end": lambda d: d["weights"]["embedding"].update(bits=4),
    "name a number": lambda d: d.update(name=3),
    "pattern a number": lambda d: d["overrides"][0].update(pattern=3),
    "alpha text": lambda d: d["steps"].append({"name": "smooth_input", "alpha": "0.5"}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_malformed_data_raises(edit: str) -> None:
    with pytest.raises(RecipeError, match=r"found|expected"):
        Recipe.from_dict(_edited(EDITS[edit]))


@pytest.mark.parametrize("text", ["", "{", "nonsense", "[]", "3", "null", '"quamba"', '{"name": "x"}'])
def test_malformed_json_raises(text: str) -> None:
    with pytest.raises(RecipeError, match="expected"):
        Recipe.from_json(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"granularity": "row"}, "found granularity 'row'; expected one of"),
        ({"observer": "minmax"}, "found observer 'minmax'; expected one of"),
        ({"observer": "percentile"}, "percentile None; expected a percentile exactly"),
        ({"percentile": 0.9}, "observer 'absmax' with percentile 0.9"),
        ({"observer": "percentile", "percentile": 0.5}, r"found percentile 0.5; expected a fraction in \(0.5, 1\]"),
        ({"observer": "percentile", "percentile": 99.9}, "found percentile 99.9; expected a fraction"),
        ({"observer": "percentile", "percentile": float("nan")}, "found percentile nan; expected a fraction"),
        ({"headroom": 0.9}, r"found headroom 0.9; expected a factor in \[1, 16\]"),
        ({"headroom": float("nan")}, "found headroom nan; expected a factor"),
        ({"headroom": "1"}, "found headroom '1'; expected a factor"),
        ({"granularity": "token", "headroom": 1.5}, "found headroom 1.5 with granularity 'token'; expected 1"),
        ({"vocabulary": 1}, "found vocabulary 1; expected true or false"),
        ({"granularity": "token", "vocabulary": True}, "found vocabulary with granularity 'token' and .* static scale"),
        ({"observer": "percentile", "percentile": 0.9, "vocabulary": True}, "'percentile'; expected .* 'absmax'"),
        ({"observer": "octav", "vocabulary": True}, "'octav'; expected a static scale and 'absmax'"),
        ({"bits": 1}, "found bits 1; expected 8"),
        ({"bits": 16}, "found bits 16; expected 8"),
        ({"bits": 4.0}, r"found bits 4\.0; expected 8"),
        ({"granularity": "token", "observer": "octav"}, "granularity 'token'; expected 'absmax'"),
        (
            {"granularity": "token", "observer": "percentile", "percentile": 0.9},
            "granularity 'token'; expected 'absmax'",
        ),
        ({"granularity": "channel", "observer": "octav"}, "expected granularity 'tensor'"),
    ],
)
def test_bad_spec_raises(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantSpec(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("turn",), "found step 'turn'; expected one of"),
        (("rotate_x", 0.5), "the smoothing steps alone have one"),
        (("smooth_input",), "the smoothing steps alone have one"),
        (("smooth_output", 1.5), r"found alpha 1.5 in step 'smooth_output'; expected a number in \[0, 1\]"),
        (("smooth_output", float("nan")), "found alpha nan"),
        (("smooth_output", 0.5, 1.5), "found reach 1.5 in step 'smooth_output'; expected it in 'smooth_input' alone"),
        (("rotate_x", None, 1.5), "found reach 1.5 in step 'rotate_x'"),
        (("smooth_input", 0.5, 0.9), r"found reach 0.9; expected a factor in \[1, 16\]"),
        (("smooth_input", 0.5, float("nan")), "found reach nan; expected a factor"),
        (("smooth_input", 0.5, "2"), "found reach '2'; expected a factor"),
    ],
)
def test_bad_step_raises(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Step(*arguments)


@pytest.mark.parametrize(
    ("site", "granularity"),
    [
        ("u", "channel"),
        ("d", "channel"),
        ("g", "channel"),
        ("head.input", "channel"),
        ("x0", "token"),
        ("z", "token"),
        ("B", "token"),
        ("C", "token"),
        ("dt", "token"),
        ("in_proj", "token"),
        ("conv", "token"),
        ("embedding", "token"),
    ],
)
def test_granularity_that_an_op_does_not_take_raises(site: str, granularity: str) -> None:
    kind = "activations" if site in ACTIVATIONS else "weights"
    values = getattr(make_recipe(), kind)
    with pytest.raises(RecipeError, match=f"found granularity '{granularity}' for '{site}'"):
        make_recipe(**{kind: {**values, site: QuantSpec(granularity)}})
    pattern = site if site in MODEL_ADDRESSES else f"layers.*.{site}"
    recipe = with_override(pattern, QuantSpec(granularity))
    with pytest.raises(RecipeError, match=f"found granularity '{granularity}' for '{site}'"):
        recipe.spec(site if site in MODEL_ADDRESSES else f"layers.2.{site}")


def test_a_spec_of_another_type_raises() -> None:
    with pytest.raises(RecipeError, match="found 'int8' for 'x'; expected a QuantSpec or None"):
        make_recipe(activations={**make_recipe().activations, "x": "int8"})


@pytest.mark.parametrize(
    ("pattern", "hit", "missed"),
    [
        ("layers.3.x", ["layers.3.x"], ["layers.3.x0", "layers.13.x", "layers.3.u"]),
        ("layers.*.x", ["layers.0.x", "layers.11.x"], ["layers.0.x0", "head.input"]),
        ("layers.*.x*", ["layers.0.x", "layers.0.x0", "layers.0.x_proj"], ["layers.0.u"]),
        ("layers.1", ["layers.1.u", "layers.1.conv", "layers.1.B"], ["layers.11.u", "layers.0.u", "head.weight"]),
        ("layers.[01]", ["layers.0.u", "layers.1.conv"], ["layers.2.u"]),
        ("head", ["head.input", "head.weight"], ["embedding", "layers.0.u"]),
        ("head.*", ["head.input", "head.weight"], ["embedding"]),
        ("embedding", ["embedding"], ["head.input", "head.weight"]),
        ("*", ["embedding", "head.input", "layers.5.dt"], []),
        ("layers.*.b", [], ["layers.0.B"]),
    ],
)
def test_globs(pattern: str, hit: list[str], missed: list[str]) -> None:
    recipe = with_override(pattern, None)
    assert all(recipe.spec(address) is None for address in hit)
    assert all(recipe.spec(address) is not None for address in missed)


def test_the_last_override_wins() -> None:
    recipe = make_recipe().with_overrides([Override("layers.*.x", PERCENTILE), Override("layers.2")])
    recipe = recipe.with_overrides([Override("layers.2.x", QuantSpec("tensor", "octav"))])
    assert recipe.spec("layers.0.x") == PERCENTILE
    assert recipe.spec("layers.2.x") == QuantSpec("tensor", "octav")
    assert recipe.spec("layers.2.u") is None
    assert recipe.spec("layers.2.in_proj") is None
    assert replace(recipe, overrides=recipe.overrides[::-1]).spec("layers.2.x") == PERCENTILE


@pytest.mark.parametrize("pattern", ["layers.7", "layers.7.x", "layers.*.y", "heads", "embeddings", "", "layer.0"])
def test_an_override_that_matches_nothing_raises(pattern: str) -> None:
    recipe = make_recipe().with_overrides([Override("layers.0"), Override(pattern)])
    with pytest.raises(RecipeError, match="matches nothing; expected a glob"):
        recipe.check(range(4))


def test_check_knows_the_layers() -> None:
    with_override("layers.7.x", None).check([3, 7])
    with pytest.raises(RecipeError, match=r"'layers\.7\.x' matches nothing"):
        with_override("layers.7.x", None).check([3, 5])


@pytest.mark.parametrize(
    "address",
    ["x", "layers.0.y", "layers.0", "head", "lm_head", "layers.0.head.input", "layers.0.embedding", "layers.a.x", ""],
)
def test_an_unknown_address_raises(address: str) -> None:
    with pytest.raises(RecipeError, match="found address"):
        make_recipe().spec(address)


def test_the_head_is_smoothed_where_it_is_quantized() -> None:
    recipe = make_recipe(steps=(Step("smooth_output", 0.5), Step("smooth_head", 0.25)))
    assert recipe.head_smoothing == 0.25
    assert [step.name for step in recipe.block(0).steps] == ["smooth_output"]
    assert recipe.with_overrides([Override("head.input")]).head_smoothing is None
    assert recipe.with_overrides([Override("head.weight")]).head_smoothing is None
    assert make_recipe().head_smoothing is None


@pytest.mark.parametrize("head", [QuantSpec("token"), QuantSpec()])
def test_smooth_head_with_what_it_excludes_raises(head: QuantSpec) -> None:
    recipe = make_recipe()
    steps = (Step("smooth_head", 0.5), *([] if head.granularity == "token" else [Step("rotate_residual")]))
    found = "a scale per token" if head.granularity == "token" else "rotate_residual"
    with pytest.raises(RecipeError, match=f"found smooth_head with {found}"):
        replace(recipe, activations={**recipe.activations, "head.input": head}, steps=steps)


def test_a_step_is_left_out_where_its_site_stays_float() -> None:
    all_steps = (
        Step("smooth_input", 0.5),
        Step("smooth_output", 0.5),
        Step("rotate_output"),
        Step("rotate_x"),
        Step("rotate_residual"),
    )
    recipe = make_recipe(steps=all_steps).with_overrides(
        [Override("layers.0.u"), Override("layers.1.g"), Override("layers.2.x"), Override("layers.3")]
    )

    def names(layer: int) -> list[str]:
        return [step.name for step in recipe.block(layer).steps]

    assert names(0) == ["smooth_output", "rotate_output", "rotate_x", "rotate_residual"]
    assert names(1) == ["smooth_input", "rotate_x", "rotate_residual"]
    assert names(2) == ["smooth_input", "smooth_output", "rotate_output", "rotate_residual"]
    # The residual stream is the model's, so its rotation holds for every block.
    assert names(3) == ["rotate_residual"]
    assert names(4) == [step.name for step in all_steps]
    assert recipe.block(3).is_float
    assert not recipe.block(0).is_float
    assert recipe.block(0).granularity("u") is None
    assert recipe.block(0).granularity("x") == "tensor"
    assert recipe.block(0).step("smooth_input") is None
    assert recipe.block(4).step("smooth_input") == Step("smooth_input", 0.5)


def test_a_recipe_does_not_change() -> None:
    activations = dict.fromkeys(ACTIVATIONS, QuantSpec())
    recipe = make_recipe(activations=activations)
    activations["x"] = PERCENTILE
    assert recipe.spec("layers.0.x") == QuantSpec()
    with pytest.raises(TypeError):
        recipe.activations["x"] = PERCENTILE  # type: ignore[index]
    with pytest.raises(AttributeError):
        recipe.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("where", ["activations", "weights", "overrides"])
def test_fewer_bits_make_a_simulation(where: str) -> None:
    few = QuantSpec(bits=4)
    plain = make_recipe()
    assert not plain.simulated
    assert plain.label == "mine"
    if where == "overrides":
        recipe = with_override("layers.1.x", few)
        assert not recipe.block(0).simulated
    else:
        site = "B" if where == "activations" else "conv"
        recipe = make_recipe(**{where: {**getattr(plain, where), site: few}})
    assert recipe.simulated
    assert recipe.block(1).simulated
    assert recipe.label == "mine (simulation)"
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize("address", MODEL_ADDRESSES)
def test_the_ends_are_not_simulated(address: str) -> None:
    with pytest.raises(RecipeError, match=r"found bits 4 for .*; expected 8: only blocks are simulated"):
        with_override(address, QuantSpec(bits=4)).spec(address)


@pytest.mark.parametrize("weight", WEIGHTS[:-2])
def test_weights_have_no_headroom(weight: str) -> None:
    with pytest.raises(RecipeError, match=f"found headroom 1.5 for the weight '{weight}'; expected 1"):
        make_recipe(weights={**make_recipe().weights, weight: QuantSpec(headroom=1.5)})


@pytest.mark.parametrize("weight", WEIGHTS)
def test_weights_do_not_depend_on_the_vocabulary(weight: str) -> None:
    with pytest.raises(RecipeError, match=f"found vocabulary for the weight '{weight}'; expected it for activations"):
        make_recipe(weights={**make_recipe().weights, weight: QuantSpec(vocabulary=True)})
