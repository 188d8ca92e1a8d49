"""Histograms of magnitudes: every value in its bin, every bin as narrow as promised."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quamba import histogram


def test_bins_are_contiguous_and_as_narrow_as_promised() -> None:
    edges = histogram.edges()
    assert edges.shape == (histogram.BINS + 1,)
    assert float(edges[0]) == 0.0
    assert float(edges[1]) == 2.0**-40
    assert float(edges[-1]) == histogram.LIMIT == 2.0**40
    widths = edges.diff()
    assert bool((widths > 0).all())
    assert float((widths[1:] / edges[1:-1]).max()) <= histogram.RESOLUTION == 2.0**-11


@settings(deadline=None, max_examples=80)
@given(st.lists(st.floats(-(2.0**39), 2.0**39, width=32), min_size=1, max_size=60))
def test_every_value_falls_into_its_bin(data: list[float]) -> None:
    values = torch.tensor(data, dtype=torch.float32)
    expected, _ = np.histogram(values.abs().double().numpy(), bins=histogram.edges().numpy())
    assert np.array_equal(histogram.count(values).numpy(), expected)


def test_the_edges_themselves_open_their_bins() -> None:
    edges = histogram.edges()[:-1].float()
    assert torch.equal(histogram.count(edges), torch.ones(histogram.BINS, dtype=torch.int64))
    assert torch.equal(histogram.count(-edges), histogram.count(edges))


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5_000_000])
def test_counts_over_chunks(size: int) -> None:
    counts = histogram.count(torch.full((size,), 1.5))
    assert int(counts.sum()) == int(counts.max()) == size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_counted_as_float32(dtype: torch.dtype) -> None:
    values = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(histogram.count(values), histogram.count(values.float()))
    assert torch.equal(histogram.count(values.T), histogram.count(values))


def test_large_counts_do_not_overflow() -> None:
    counts = torch.zeros(histogram.BINS, dtype=torch.int64)
    counts[1000], counts[100_000] = 10**12, 10**9
    high = histogram.edges()[100_001].item()
    assert histogram.quantile(counts, high, 0.5) == pytest.approx(histogram.edges()[1000].item(), rel=0.001)
    assert histogram.quantile(counts, high, 0.9999) == pytest.approx(histogram.edges()[100_000].item(), rel=0.001)
    assert histogram.share_beyond(counts, high, 1e-9) == pytest.approx(1e9 / (1e12 + 1e9))
