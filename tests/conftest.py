"""Fixtures for everybody: tiny random models, and two threads at most."""

import pytest
import torch
from torch import nn

from tests.tiny import FAMILIES, make_model


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(params=FAMILIES)
def tiny_model(request: pytest.FixtureRequest) -> nn.Module:
    """A tiny random model of every family, in float32; the test may change it."""
    return make_model(request.param)
