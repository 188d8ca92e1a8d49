"""Every step leaves the float function as it is: blocks in float64, and whole models."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from quamba import hadamard, ops
from quamba.errors import RecipeError
from quamba.models import find_adapter
from quamba.nn.mixer import Mixer
from quamba.recipe import BLOCK_ACTIVATIONS, Override, QuantSpec, Step
from quamba.recipes import RECIPES
from quamba.transforms import Transforms, fold, smoothing_divisor
from tests.tiny import FAMILIES, find_transforms, hidden_states, make_mixer, make_model, token_ids

DIVISOR_U, DIVISOR_G = (hidden_states(1, 1, size, dtype=torch.float64, seed=9)[0, 0].abs() + 0.1 for size in (24, 48))
STEPS = {
    "smooth_input": Transforms(u_divisor=DIVISOR_U),
    "smooth_output": Transforms(g_divisor=DIVISOR_G),
    "rotate_output": Transforms(rotate_g=True),
    "rotate_x": Transforms(rotate_x=True),
    "rotate_residual": Transforms(rotate_u=True),
    "smooth_output, rotate_output": Transforms(g_divisor=DIVISOR_G, rotate_g=True),
    "smooth both, rotate_output": Transforms(u_divisor=DIVISOR_U, g_divisor=DIVISOR_G, rotate_g=True),
    "rotate all": Transforms(rotate_u=True, rotate_x=True, rotate_g=True),
    "all that go together": Transforms(rotate_u=True, rotate_x=True, g_divisor=DIVISOR_G, rotate_g=True),
}
BLOCKS = {
    "plain": {},
    "all biases": {"in_bias": True, "out_bias": True},
    "no biases": {"conv_bias": False},
    "without residual": {"residual": False, "out_bias": True},
    "learned norms": {"dbc_norm": "learned", "residual": False},
    "weightless norms": {"dbc_norm": "weightless"},
    "wide": {"d_inner": 40, "d_model": 20, "dt_rank": 7, "d_state": 3, "d_conv": 2},
}


def turned(value: Tensor, turn: bool) -> Tensor:
    """A residual stream in the rotated coordinates, by the matrix itself."""
    return value @ hadamard.matrix(value.shape[-1], dtype=value.dtype).T if turn else value


def fitted(transforms: Transforms, mixer: Mixer, dtype: torch.dtype = torch.float64) -> Transforms:
    """The same transforms for a mixer's widths, with divisors of a dtype."""
    c, u, g = mixer.config, transforms.u_divisor, transforms.g_divisor
    return replace(
        transforms,
        u_divisor=None if u is None else u[: c.d_model].to(dtype),
        g_divisor=None if g is None else g[: c.d_inner].to(dtype),
    )


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("block", BLOCKS)
def test_folded_block_is_exact_in_float64(step: str, block: str) -> None:
    mixer = make_mixer(dtype=torch.float64, **BLOCKS[block])
    c = mixer.config
    transforms = fitted(STEPS[step], mixer)
    hidden = hidden_states(2, 9, c.d_model, dtype=torch.float64)
    folded = Mixer(c, fold(mixer.tensors(), transforms), transforms=transforms, folded=True)
    with ops.reference():
        expected = turned(mixer(hidden), transforms.rotate_u)
        found = folded(turned(hidden, transforms.rotate_u))
    assert expected.dtype == torch.float64
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-13
    # The weights did change, or there would be nothing to test.
    assert any(not torch.equal(mixer.tensors()[name], folded.tensors()[name]) for name in mixer.tensors())


@pytest.mark.parametrize("step", STEPS)
def test_observed_sites_are_those_of_the_folded_block(step: str) -> None:
    mixer = make_mixer(dtype=torch.float64, in_bias=True)
    transforms = STEPS[step]
    hidden = hidden_states(2, 9, 24, dtype=torch.float64)
    seen: dict[str, dict[str, Tensor]] = {"observed": {}, "folded": {}}
    folded = Mixer(mixer.config, fold(mixer.tensors(), transforms), transforms=transforms, folded=True)
    folded.observer = lambda site, value, mask: seen["folded"].update({site: value})
    observed = Mixer(mixer.config, mixer.tensors(), transforms=transforms)
    observed.observer = lambda site, value, mask: seen["observed"].update({site: value})
    with ops.reference():
        expected = mixer(hidden)
        assert torch.equal(observed(hidden), expected), "observing changes nothing"
        folded(turned(hidden, transforms.rotate_u))
    assert set(seen["observed"]) == set(BLOCK_ACTIVATIONS)
    for site in BLOCK_ACTIVATIONS:
        torch.testing.assert_close(seen["observed"][site], seen["folded"][site], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_block_in_the_models_precision(step: str, dtype: torch.dtype) -> None:
    mixer = make_mixer(dtype=dtype)
    transforms = fitted(STEPS[step], mixer, torch.float32)
    hidden = hidden_states(2, 9, 24)
    tensors = {name: tensor.float() for name, tensor in mixer.tensors().items()}
    wide = make_mixer().config
    folded = Mixer(wide, fold(tensors, transforms), transforms=transforms, folded=True)
    expected = turned(Mixer(wide, tensors)(hidden), transforms.rotate_u)
    found = folded(turned(hidden, transforms.rotate_u))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    changed = [name for name, tensor in fold(mixer.tensors(), transforms).items() if tensor.dtype != dtype]
    assert set(changed) <= {"norm.weight", "in_proj.weight", "x_proj.weight", "out_proj.weight"}


def test_fold_leaves_its_input_alone() -> None:
    mixer = make_mixer(out_bias=True)
    before = {name: tensor.clone() for name, tensor in mixer.tensors().items()}
    out = fold(mixer.tensors(), STEPS["all that go together"])
    assert all(torch.equal(before[name], tensor) for name, tensor in mixer.tensors().items())
    assert out["conv.weight"] is mixer.tensors()["conv.weight"]
    assert set(out) == set(before)


def test_smoothing_does_not_go_with_a_rotated_stream() -> None:
    with pytest.raises(RecipeError, match="smooth_input with rotate_residual"):
        Transforms(u_divisor=DIVISOR_U, rotate_u=True)


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_divisor_is_smoothquants(strength: float) -> None:
    a = torch.tensor([1.0, 200.0, 0.03, 7.0])
    w = torch.tensor([0.5, 0.1, 0.7, 2.0])
    divisor = smoothing_divisor(a, w, strength)
    expected = a**strength / w ** (1 - strength)
    expected = expected / expected.log().mean().exp()
    torch.testing.assert_close(divisor, expected)
    if strength == 1.0:  # all of the range moves to the weights
        torch.testing.assert_close(a / divisor, (a / divisor)[:1].expand(4))


def test_smoothing_divisor_of_dead_channels_is_finite() -> None:
    divisor = smoothing_divisor(torch.tensor([0.0, 1.0, 1e30]), torch.tensor([1.0, 0.0, 1e-30]), 0.5)
    assert bool((torch.isfinite(divisor) & (divisor > 0)).all())
    assert divisor.dtype == torch.float32


def test_smoothing_evens_the_channels_out() -> None:
    mixer = make_mixer()
    hidden = hidden_states(2, 50, 24)
    format = RECIPES["smoothquant"].block(0)
    seen: dict[str, Tensor] = {}
    for name, transforms in (("before", Transforms()), ("after", find_transforms(mixer, format, hidden))):
        watched = Mixer(mixer.config, mixer.tensors(), transforms=transforms)
        watched.observer = lambda site, value, mask, name=name: seen.update(
            {f"{name} {site}": value.abs().amax((0, 1))}
        )
        watched(hidden)
    for site in ("u", "g"):
        before, after = seen[f"before {site}"].log(), seen[f"after {site}"].log()
        assert float(after.std()) < 0.8 * float(before.std())


def folded_model(family: str, steps: tuple[Step, ...], ids: Tensor) -> nn.Module:
    """A model whose every block is folded for the steps, its ends and the rest with it."""
    model = make_model(family)
    adapter = find_adapter(model)
    format = RECIPES["naive"].block(0)
    format = replace(format, steps=steps)
    streams: dict[int, Tensor] = {}
    mixers = {i: Mixer(adapter.config(model, i), adapter.tensors(model, i)) for i in adapter.layers(model)}
    for layer, mixer in mixers.items():
        mixer.register_forward_pre_hook(lambda module, args, layer=layer: streams.update({layer: args[0]}))
        adapter.install(model, layer, mixer)
    model(ids)
    rotated = any(step.name == "rotate_residual" for step in steps)
    for layer, mixer in mixers.items():
        transforms = find_transforms(mixer, format, streams[layer])
        tensors = fold(mixer.tensors(), transforms)
        adapter.shell_at(model, layer).mixer = Mixer(mixer.config, tensors, transforms=transforms, folded=True)
    if rotated:
        embedding, head = model.get_submodule(adapter.embedding(model)), model.get_submodule(adapter.head(model))
        norm = model.get_submodule(adapter.final_norm(model))
        table, weight = embedding.weight.detach(), head.weight.detach()
        head.weight = nn.Parameter(turned(weight * norm.weight.detach(), True))
        embedding.weight = nn.Parameter(turned(table, True))
        norm.weight.data.fill_(1.0)
        adapter.rotate_rest(model)
    return model


STEPS_OF_RECIPES = sorted({recipe.steps for recipe in RECIPES.values() if recipe.steps}, key=str)
ALL_STEPS = [(Step(name),) for name in ("rotate_output", "rotate_x", "rotate_residual")]
ALL_STEPS += [(Step(name, 0.5),) for name in ("smooth_input", "smooth_output")]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [*ALL_STEPS, *STEPS_OF_RECIPES], ids=lambda s: "+".join(step.name for step in s))
def test_whole_model_keeps_its_logits(family: str, steps: tuple[Step, ...]) -> None:
    ids = token_ids(2, 11)
    expected = make_model(family)(ids).logits
    found = folded_model(family, steps, ids)(ids).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"num_experts": 1}, {"num_experts": 4, "num_experts_per_tok": 3}])
def test_rotated_jamba_with_other_feed_forward_parts(changes: dict[str, int]) -> None:
    ids = token_ids(2, 7)
    model = make_model("jamba", **changes)
    adapter = find_adapter(model)
    expected = model(ids).logits
    reference = make_model("jamba", **changes)
    for layer in adapter.layers(reference):
        mixer = Mixer(adapter.config(reference, layer), adapter.tensors(reference, layer))
        tensors = fold(mixer.tensors(), Transforms(rotate_u=True))
        adapter.install(reference, layer, Mixer(mixer.config, tensors))
    for norm, name in ((None, "model.embed_tokens"), (reference.model.final_layernorm, "lm_head")):
        end = reference.get_submodule(name)
        gain = 1.0 if norm is None else norm.weight
        end.weight = nn.Parameter(turned(end.weight * gain, True))
    reference.model.final_layernorm.weight.fill_(1.0)
    adapter.rotate_rest(reference)
    found = reference(ids).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-5


def test_steps_of_kept_sites_are_known() -> None:
    """A recipe that keeps g in float asks for no rotation of it, so that nothing is folded for nothing."""
    kept = RECIPES["quamba-c"].with_overrides([Override("layers.*.g"), Override("layers.*.u", QuantSpec("token"))])
    assert [step.name for step in kept.block(0).steps] == ["smooth_input"]
