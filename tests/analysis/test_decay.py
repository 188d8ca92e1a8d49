"""The cumulative product against explicit matrices."""

import numpy as np
import pytest
import torch

from quamba.analysis.decay import LEVELS, decay, log_norms
from quamba.analysis.study import opened
from quamba.errors import CalibrationError
from tests.tiny import make_model, token_ids


def test_norms_are_those_of_the_products() -> None:
    generator = np.random.default_rng(0)
    dt = generator.uniform(0.01, 0.5, size=(2, 6, 3))
    A = -generator.uniform(0.2, 5, size=(3, 4))
    found = log_norms(torch.from_numpy(dt), torch.from_numpy(A)).numpy()
    for b in range(2):
        for channel in range(3):
            product = np.eye(4)
            for t in range(6):
                product = np.diag(np.exp(dt[b, t, channel] * A[channel])) @ product
                assert 10.0 ** found[b, t, channel] == pytest.approx(np.linalg.norm(product, 2), rel=1e-12)


def test_over_a_model() -> None:
    with opened(make_model("jamba")) as model:
        found = decay(model, [token_ids(2, 8), token_ids(1, 8, seed=1)])
    assert found.layers == (0, 1, 3)
    assert found.quantiles.shape == (3, len(LEVELS), 8)
    assert bool((found.largest.diff(dim=1) < 0).all())
    low, middle, high = found.quantiles.unbind(dim=1)
    assert bool((low <= middle).all())
    assert bool((middle <= high).all())
    assert bool((high <= found.largest).all())


def test_sequences_of_several_lengths_are_refused() -> None:
    with opened(make_model("mamba")) as model, pytest.raises(CalibrationError, match=r"\[5, 8\]"):
        decay(model, [token_ids(1, 8), token_ids(1, 5)])
