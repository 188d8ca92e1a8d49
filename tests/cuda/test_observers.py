"""Observers on a CUDA device give what they give on a CPU, there."""

import pytest
import torch

from tests.test_observers import KINDS, heavy_tailed, observed


@pytest.mark.parametrize("kind", KINDS)
def test_observers(kind: str) -> None:
    values = heavy_tailed(700, 6)
    expected = observed(KINDS[kind], values)
    found = observed(KINDS[kind], values[:300].cuda(), values[300:].cuda())
    assert found.alpha().is_cuda
    torch.testing.assert_close(found.alpha().cpu(), expected.alpha())
    assert found.clipped() == pytest.approx(expected.clipped())
    expected.merge(found)
    assert expected.count == 1400
    torch.testing.assert_close(expected.alpha().cpu(), observed(KINDS[kind], values, values).alpha())
