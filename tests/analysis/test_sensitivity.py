"""One tensor at a time: against NumPy in a block, and against quantize() with a recipe of one tensor in a model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quamba
from quamba.analysis.sensitivity import BlockErrors, block_errors, tensor_costs
from quamba.analysis.single import BLOCK_TENSORS
from quamba.analysis.study import opened, study
from quamba.errors import RecipeError
from quamba.eval.perplexity import cache_logits, compare
from quamba.recipe import Override, Recipe
from quamba.recipes import RECIPES
from tests.analysis.tools import rounded, scan, silu, sites_of
from tests.tiny import make_model, token_ids

CALIBRATION = [token_ids(6, 13, seed=1)]
EVALUATION = token_ids(3, 13, seed=2)


def errors_of(recipe: str, family: str = "mamba") -> tuple[BlockErrors, dict[str, dict[str, np.ndarray]]]:
    """The errors of the first layer, and what NumPy makes of a few of them with the absmax scales of calibration."""
    expected: dict[str, dict[str, np.ndarray]] = {}
    with opened(make_model(family)) as model, torch.no_grad():
        found_study = study(model, RECIPES[recipe], CALIBRATION)
        found = block_errors(found_study, [EVALUATION[:2], EVALUATION[2:]])
        mixer = model.mixers[0]
        hidden = model.model.get_submodule(model.adapter.embedding(model.model))(EVALUATION)
        sites = sites_of(mixer, hidden)
        y = scan(mixer, sites)
        weight = mixer.tensors()["out_proj.weight"].double().numpy()
        gate = silu(sites["z"])

        def record(name: str, new_y: np.ndarray, new_out: np.ndarray) -> None:
            out = (y * gate) @ weight.T
            expected[name] = {
                "y": ((new_y - y) ** 2).sum(axis=(0, 2)) / (y**2).sum(axis=(0, 2)),
                "out": ((new_out - out) ** 2).sum(axis=(0, 2)) / (out**2).sum(axis=(0, 2)),
            }

        def alpha(site: str) -> float:
            return float(found_study.alphas[f"layers.0.{site}"])

        for site in ("B", "C", "dt"):
            changed = scan(mixer, {**sites, site: rounded(sites[site], alpha(site))})
            record(site, changed, (changed * gate) @ weight.T)
        record("z", y, (y * silu(rounded(sites["z"], alpha("z")))) @ weight.T)
        record("g", y, rounded(y * gate, alpha("g")) @ weight.T)
        quantized_y = rounded(y, float(found_study.y_alphas[0]))
        record("y", quantized_y, (quantized_y * gate) @ weight.T)
        rows = np.abs(weight).max(axis=1, keepdims=True) / 127
        record("out_proj", y, (y * gate) @ (rows * np.round(weight / rows)).T)
    return found, expected


def test_errors_are_those_of_numpy() -> None:
    found, expected = errors_of("naive")
    assert found.names == BLOCK_TENSORS
    for at in ("y", "out"):
        table = found.nmse_over_time(at)
        assert table.shape == (len(BLOCK_TENSORS), 3, 13)
        for name, rows in expected.items():
            mine = table[found.names.index(name), 0].numpy()
            # Single values may round the other way in float32: most time steps agree closely, all of them roughly.
            close = np.isclose(mine, rows[at], rtol=2e-2, atol=1e-12)
            assert close.mean() > 0.8, (name, at)
            np.testing.assert_allclose(mine.sum(), rows[at].sum(), rtol=0.1, atol=1e-11, err_msg=f"{name} at {at}")


def test_nmse_is_noise_over_signal_of_all_steps() -> None:
    found, _ = errors_of("naive")
    whole = (found.nmse_over_time("out") * found.out_signal).sum(dim=-1) / found.out_signal.sum(dim=-1)
    torch.testing.assert_close(found.nmse("out"), whole)
    with pytest.raises(RecipeError, match="'y' or 'out'"):
        found.nmse("g")


def test_what_the_recipe_keeps_in_float_is_nan() -> None:
    recipe = RECIPES["naive"].with_overrides([Override("layers.1.x"), Override("layers.*.conv")])
    with opened(make_model("mamba")) as model:
        found = block_errors(study(model, recipe, CALIBRATION), [EVALUATION], names=("x", "conv", "C"))
    missing = found.nmse("y").isnan()
    assert missing.tolist() == [[False, True, False], [True, True, True], [False, False, False]]


@pytest.mark.parametrize("family", ["mamba-biased", "falcon_mamba", "jamba"])
def test_smoothed_and_rotated_coordinates_come_back(family: str) -> None:
    """Without rounding the changes of coordinates do nothing: the error stays small beside the signal."""
    with opened(make_model(family)) as model:
        found = block_errors(study(model, RECIPES["quamba-c"], CALIBRATION), CALIBRATION)
    for at in ("y", "out"):
        table = found.nmse(at)
        assert bool(table.isfinite().all())
        assert float(table.max()) < 0.02
    # What comes after the scan leaves y as it is.
    for name in ("z", "g", "out_proj"):
        assert float(found.nmse("y")[found.names.index(name)].max()) < 1e-10
    for name in set(BLOCK_TENSORS):
        assert float(found.nmse("out")[found.names.index(name)].min()) > 1e-9


def only(recipe: Recipe, name: str) -> Recipe:
    """A recipe of one tensor, with the steps of its activation."""
    float_recipe = RECIPES["float"]
    return replace(
        float_recipe,
        name=f"only {name}",
        activations={k: recipe.activations[k] if k == name else None for k in recipe.activations},
        weights={k: recipe.weights[k] if k == name else None for k in recipe.weights},
        steps=recipe.steps,
    )


@pytest.mark.parametrize("recipe", ["naive", "quamba-c"])
@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_costs_are_those_of_a_recipe_of_one_tensor(recipe: str, family: str) -> None:
    ids = token_ids(60, seed=3)
    # A weight's coordinates follow an activation, so of quamba-c only those without steps can be compared.
    names = ["u", "x", "B", "dt", "g", "conv", "dt_proj", "embedding", "head.weight"]
    names += ["in_proj", "out_proj"] if recipe == "naive" else []
    model = make_model(family)
    with opened(model) as open_model:
        own = study(open_model, RECIPES[recipe], CALIBRATION)
        reference = cache_logits(model, ids, context=16, progress=False)
        found = {cost.name: cost for cost in tensor_costs(own, reference, ids, names=names)}
    assert list(found) == names
    for name in names:
        quantized = make_model(family)
        quamba.quantize(quantized, CALIBRATION, only(RECIPES[recipe], name))
        expected = compare(quantized, reference, ids, context=16, progress=False)
        increase = 100 * (expected.model.perplexity / expected.reference.perplexity - 1)
        assert found[name].kl == pytest.approx(expected.kl, rel=1e-3, abs=1e-8), name
        assert found[name].increase_percent == pytest.approx(increase, rel=1e-3, abs=1e-4), name
        assert found[name].stderr_percent == pytest.approx(100 * expected.nll_difference_stderr, rel=1e-2, abs=1e-4)
        assert found[name].kl > 0


@pytest.mark.parametrize("recipe", ["naive", "dynamic"])
@torch.no_grad()
def test_the_head_alone_reads_rounded_hidden_states(recipe: str) -> None:
    ids = token_ids(40, seed=4)
    model = make_model("mamba")
    with opened(model) as open_model:
        own = study(open_model, RECIPES[recipe], CALIBRATION)
        reference = cache_logits(model, ids, context=40, progress=False)
        (cost,) = tensor_costs(own, reference, ids, names=["head.input"])
        hidden = open_model.adapter.run_backbone(model, ids[None], None)[0, :-1].double().numpy()
    alphas = np.abs(hidden).max(axis=1) if recipe == "dynamic" else [float(own.alphas["head.input"])] * len(hidden)
    seen = np.stack([rounded(row, alpha) for row, alpha in zip(hidden, alphas, strict=True)])
    p, q = (torch.log_softmax(torch.from_numpy(v) @ head_of(model).T, -1) for v in (hidden, seen))
    assert cost.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.05)


def head_of(model: nn.Module) -> Tensor:
    weight = model.get_submodule("lm_head").weight
    assert isinstance(weight, Tensor)
    return weight.detach().double()


def test_unknown_tensors_are_refused() -> None:
    with opened(make_model("mamba")) as model:
        own = study(model, RECIPES["naive"], CALIBRATION)
    with pytest.raises(RecipeError, match=r"'head\.weight'"):
        block_errors(own, [EVALUATION], names=("x", "head.weight"))
    with pytest.raises(RecipeError, match="'state'"):
        tensor_costs(own, None, EVALUATION[0], names=("state",))  # type: ignore[arg-type]
