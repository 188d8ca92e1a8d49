"""Calibration: what is planned, observed and turned into coordinates."""

import pytest
import torch

from quamba import calibration
from quamba.errors import CalibrationError
from quamba.models import find_adapter
from quamba.observation import Statistics
from quamba.recipe import Override, QuantSpec
from quamba.recipes import RECIPES
from tests.tiny import make_model, mixers_of


def test_the_plan_has_the_static_sites_alone() -> None:
    recipe = RECIPES["dynamic"].with_overrides([Override("layers.1.u", QuantSpec())])
    assert calibration.static_plan(recipe, [0, 1]) == {"layers.1.u": QuantSpec()}
    naive = calibration.static_plan(RECIPES["naive"], [4])
    assert len(naive) == 10
    assert {"layers.4.x", "layers.4.g", "head.input"} <= set(naive)
    assert "head.input" not in calibration.static_plan(RECIPES["naive"].with_overrides([Override("head")]), [4])


@torch.no_grad()
def test_the_vocabulary_widens_what_asks_for_it_alone() -> None:
    model = make_model("mamba")
    adapter = find_adapter(model)
    mixers = mixers_of("mamba")
    for layer, mixer in mixers.items():
        adapter.install(model, layer, mixer)
    wide, plain = QuantSpec("channel", vocabulary=True), QuantSpec("channel")
    plan = {"layers.0.z": wide, "layers.0.x0": plain, "layers.2.dt": QuantSpec(vocabulary=True), "head.input": plain}
    width = mixers[0].config.d_inner
    small = {"layers.0.z": torch.full((width,), 1e-6), "layers.0.x0": torch.full((width,), 1e-6)}
    alphas = small | {"layers.2.dt": torch.tensor(1e6), "head.input": torch.ones(24)}
    alphas["layers.0.z"][1] = 1e6
    found = calibration.cover_vocabulary(alphas, model=model, adapter=adapter, mixers=mixers, plan=plan, show=False)

    tensors = mixers[0].tensors()
    table = model.get_submodule(adapter.embedding(model)).weight.double()
    u = table / (table.square().mean(dim=-1, keepdim=True) + mixers[0].config.norm_eps).sqrt()
    z = (u * tensors["norm.weight"].double()) @ tensors["in_proj.weight"].double()[width:].T
    expected = z.abs().amax(dim=0).float()
    expected[1] = 1e6
    torch.testing.assert_close(found["layers.0.z"], expected)
    for address in ("layers.0.x0", "layers.2.dt", "head.input"):
        assert torch.equal(found[address], alphas[address])
    assert all(mixer.observer is None for mixer in mixers.values())


def test_a_site_that_was_not_observed_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"layers\.2\.x"):
        Statistics().alpha("layers.2.x")


def test_nan_is_told_with_its_address() -> None:
    with pytest.raises(CalibrationError, match=r"^layers\.0\.B: "):
        Statistics().update("layers.0.B", QuantSpec(), torch.full((2, 3), float("nan")))
