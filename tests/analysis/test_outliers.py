"""Outliers against NumPy."""

import numpy as np
import pytest
import torch

from quamba.analysis.outliers import VIEWS, Outliers, outliers
from quamba.analysis.study import opened, study
from quamba.hadamard import matrix
from quamba.recipes import RECIPES
from tests.analysis.tools import scan, sites_of
from tests.tiny import make_model, token_ids


@torch.no_grad()
def test_against_numpy() -> None:
    data = [token_ids(2, 9, seed=5), token_ids(1, 9, seed=6)]
    with opened(make_model("mamba")) as model:
        found = outliers(study(model, RECIPES["hadamard"], data), data)
        hidden = model.model.get_submodule("backbone.embeddings")(torch.cat(data))
        sites = sites_of(model.mixers[0], hidden)
        y = scan(model.mixers[0], sites)
    assert tuple(found) == VIEWS
    h = matrix(48).numpy()
    expected = {"x": sites["x"], "y": y, "g": sites["g"], "H y": y @ h.T, "H g": sites["g"] @ h.T}
    expected["g*"] = expected["H g"]
    for view, values in expected.items():
        own, flat = found[view], values.reshape(-1, 48)
        np.testing.assert_allclose(own.absmax[0], np.abs(flat).max(axis=0), rtol=1e-3, atol=1e-6)
        assert float(own.sigma[0]) == pytest.approx(np.sqrt((flat**2).mean()), rel=1e-4)
        assert float(own.kurtosis[0]) == pytest.approx((flat**4).mean() / (flat**2).mean() ** 2, rel=1e-3)
        assert float(own.median[0]) == pytest.approx(np.median(np.abs(flat)), rel=5e-3)
        assert float(own.peak()[0]) == pytest.approx(np.abs(flat).max() / np.sqrt((flat**2).mean()), rel=1e-3)
        assert own.absmax.shape == (3, 48)


def test_shares_and_quantiles() -> None:
    absmax = torch.tensor([[1.0, 2.0, 3.0, 40.0]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    found = Outliers("g", (4,), absmax=absmax, sigma=2 * one, median=one, kurtosis=one)
    assert found.share_above(1).tolist() == [0.5]
    assert found.share_above(20).tolist() == [0.0]
    assert found.quantiles([0, 0.5, 1]).tolist() == [[0.5, 1.25, 20.0]]
