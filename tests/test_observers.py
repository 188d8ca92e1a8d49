"""Observers: against torch.quantile and NumPy, merged in any order, in bounded memory."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quamba import numerics
from quamba.errors import CalibrationError, RecipeError
from quamba.histogram import BINS, RESOLUTION
from quamba.observers import AbsMax, ChannelPercentile, Histogram, Observer, Octav, Percentile, make_observer
from quamba.recipe import QuantSpec

KINDS: dict[str, Callable[[], Observer]] = {
    "absmax tensor": lambda: AbsMax(per_channel=False),
    "absmax channel": lambda: AbsMax(per_channel=True),
    "histogram": Histogram,
    "percentile": lambda: Percentile(0.995),
    "octav": lambda: Octav(8),
    "channel percentile": lambda: ChannelPercentile(0.98, capacity=64),
}


def heavy_tailed(tokens: int, width: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, width, generator=generator) * (1.5 * torch.randn(tokens, width, generator=generator)).exp()
    )


def observed(make: Callable[[], Observer], *parts: Tensor) -> Observer:
    observer = make()
    for part in parts:
        observer.update(part)
    return observer


def exact_quantile(values: Tensor, p: float) -> float:
    return float(np.quantile(values.abs().double().numpy(), p))


def test_absmax_is_the_largest_magnitude() -> None:
    values = torch.tensor([[1.0, -7.5, 0.25], [2.0, 3.0, -0.5]])
    assert observed(KINDS["absmax tensor"], values).alpha().item() == 7.5
    per_channel = observed(KINDS["absmax channel"], values[:1], values[1:]).alpha()
    assert per_channel.tolist() == [2.0, 7.5, 0.5]
    assert per_channel.dtype == torch.float32
    assert observed(KINDS["absmax tensor"], values).clipped() == 0.0


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 0.9, 0.99, 0.9995, 0.9999, 0.99999, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 17, 40_000])
def test_histogram_quantile_is_torch_quantile(p: float, tokens: int) -> None:
    values = heavy_tailed(tokens, 7)
    histogram = observed(Histogram, values[: tokens // 3], values[tokens // 3 :])
    assert isinstance(histogram, Histogram)
    expected = float(torch.quantile(values.abs().double().flatten(), p))
    assert histogram.quantile(p) == pytest.approx(expected, rel=RESOLUTION)


@settings(deadline=None, max_examples=60)
@given(
    data=st.lists(
        st.floats(-(2.0**39), 2.0**39, width=32, allow_nan=False, allow_subnormal=False), min_size=1, max_size=200
    ),
    p=st.floats(0.0, 1.0),
)
def test_histogram_quantile_property(data: list[float], p: float) -> None:
    values = torch.tensor(data, dtype=torch.float32)[:, None]
    histogram = observed(Histogram, values)
    assert isinstance(histogram, Histogram)
    # Magnitudes under 2^-40 count as zero.
    assert histogram.quantile(p) == pytest.approx(exact_quantile(values, p), rel=RESOLUTION, abs=2.0**-40)
    assert histogram.quantile(1.0) == float(values.abs().max())


def test_histogram_resolution_over_its_whole_range() -> None:
    exponents = torch.linspace(-39.9, 39.9, 601, dtype=torch.float64)
    for value in (2.0**exponents).float()[::10]:
        histogram = observed(
            Histogram, torch.tensor([[value], [value], [2 * value], [4 * value]]).clamp(max=2.0**39.99)
        )
        assert isinstance(histogram, Histogram)
        assert abs(histogram.quantile(0.25) / float(value) - 1) <= RESOLUTION


def test_percentile_of_sparse_zeros() -> None:
    values = torch.zeros(1000, 3)
    values[5, 1] = -4.0
    assert observed(lambda: Percentile(0.99), values).alpha().item() == 0.0
    assert observed(lambda: Percentile(1.0), values).alpha().item() == 4.0
    assert observed(lambda: Octav(8), torch.zeros(9, 2)).alpha().item() == 0.0


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.7, 3.0, 40.0])
def test_clipped_share(alpha: float) -> None:
    values = heavy_tailed(30_000, 5)
    histogram = observed(Histogram, values)
    assert isinstance(histogram, Histogram)
    exact = float((values.abs() > alpha).double().mean())
    # The values within one bin of alpha are the ones in doubt.
    doubt = float(((values.abs() / max(alpha, 1e-30) - 1).abs() < 2 * RESOLUTION).double().mean())
    assert abs(histogram.clipped_share(alpha) - exact) <= doubt + 1e-12
    assert histogram.clipped_share(float(values.abs().max())) == 0.0
    assert histogram.clipped() == 0.0


def test_percentile_reports_what_it_clips() -> None:
    values = heavy_tailed(50_000, 4)
    observer = observed(lambda: Percentile(0.999), values)
    assert observer.clipped() == pytest.approx(0.001, rel=0.02)
    assert 0 < observed(lambda: Octav(8), values).clipped() < 1e-3


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("law", ["normal", "heavy", "laplace"])
def test_octav_finds_the_least_square_error(bits: int, law: str) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(15_000, 4, generator=generator, dtype=torch.float64)
    if law == "heavy":
        values = values * torch.randn(15_000, 4, generator=generator, dtype=torch.float64).exp()
    elif law == "laplace":
        values = values.sign() * -torch.rand(15_000, 4, generator=generator, dtype=torch.float64).log()
    values = values.float()
    top = 2 ** (bits - 1) - 1

    def error(alpha: float) -> float:
        step = alpha / top
        return float(((values / step).round().clamp(-top - 1, top) * step - values).double().square().mean())

    maximum = float(values.abs().max())
    best = min(error(maximum * fraction) for fraction in torch.linspace(0.02, 1, 80).tolist())
    # OCTAV takes a step of alpha / 2^(bits - 1); ours is alpha / (2^(bits - 1) - 1), which shows at 4 bits.
    assert error(float(observed(lambda: Octav(bits), values).alpha())) <= (1.03 if bits == 8 else 1.05) * best


def test_octav_is_the_fixed_point() -> None:
    magnitude = heavy_tailed(100_000, 3).abs().double()
    alpha = float(observed(lambda: Octav(8), magnitude.float()).alpha())
    beyond = magnitude > alpha
    following = magnitude[beyond].sum() / (4.0**-8 / 3 * (~beyond & (magnitude > 0)).sum() + beyond.sum())
    assert float(following) == pytest.approx(alpha, rel=0.005)


def test_octav_of_a_constant() -> None:
    alpha = float(observed(lambda: Octav(8), torch.full((1000, 3), -2.5)).alpha())
    assert 0.95 * 2.5 <= alpha <= 2.5


@pytest.mark.parametrize("p", [0.95, 0.99, 0.995, 1.0])
@pytest.mark.parametrize("cuts", [(), (5,), (700, 701), (100, 400, 900)])
def test_channel_percentile_is_exact(p: float, cuts: tuple[int, ...]) -> None:
    values = heavy_tailed(1001, 6)
    parts = torch.tensor_split(values, cuts) if cuts else (values,)
    alpha = observed(lambda: ChannelPercentile(p, capacity=64), *parts).alpha()
    expected = torch.quantile(values.abs().double(), p, dim=0)
    torch.testing.assert_close(alpha.double(), expected, rtol=1e-5, atol=0)
    clipped = observed(lambda: ChannelPercentile(p, capacity=64), *parts).clipped()
    assert clipped == pytest.approx(float((values.abs() > alpha).double().mean()), abs=1e-12)


def test_channel_percentile_tells_every_quantile_that_it_keeps() -> None:
    values = heavy_tailed(1000, 3)
    observer = observed(lambda: ChannelPercentile(1.0, capacity=32), values)
    assert isinstance(observer, ChannelPercentile)
    for p in (observer.least + 1e-9, 0.98, 0.9995, 1.0):
        expected = torch.quantile(values.abs().double(), p, dim=0)
        torch.testing.assert_close(observer.quantile(p).double(), expected, rtol=1e-5, atol=0)
    with pytest.raises(CalibrationError, match="expected at most 32"):
        observer.quantile(observer.least - 1e-3)
    few = observed(lambda: ChannelPercentile(1.0, capacity=32), values[:20])
    assert isinstance(few, ChannelPercentile)
    assert few.least == 0.0
    torch.testing.assert_close(few.quantile(0.0), values[:20].abs().amin(dim=0))
    with pytest.raises(CalibrationError, match="no values"):
        ChannelPercentile(0.9).quantile(0.9)


def test_channel_percentile_says_when_it_cannot_be_exact() -> None:
    observer = observed(lambda: ChannelPercentile(0.9, capacity=32), heavy_tailed(1000, 3))
    with pytest.raises(CalibrationError, match=r"needs the largest 101 .* at most 32.*at least 0\.96") as raised:
        observer.alpha()
    # The percentile that the message names works.
    least = float(str(raised.value).split("at least ")[1].split(",")[0])
    assert observed(lambda: ChannelPercentile(least, capacity=32), heavy_tailed(1000, 3)).alpha().shape == (3,)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_shards_merge_in_any_order(kind: str, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 300))
    values = heavy_tailed(tokens, 3, seed=data.draw(st.integers(0, 1000)))
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=4)))
    shards = [observed(KINDS[kind], part) for part in torch.tensor_split(values, cuts)]
    first, *rest = data.draw(st.permutations(shards))
    for shard in rest:
        first.merge(shard)
    whole = observed(KINDS[kind], values)
    assert first.count == whole.count == tokens
    assert torch.equal(first.alpha(), whole.alpha())
    assert first.clipped() == whole.clipped()


def state_bytes(observer: Observer) -> int:
    return sum(v.untyped_storage().nbytes() for v in vars(observer).values() if isinstance(v, Tensor))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_data(kind: str) -> None:
    observer = observed(KINDS[kind], heavy_tailed(500, 16))
    before = state_bytes(observer)
    for seed in range(20):
        observer.update(heavy_tailed(500, 16, seed=seed))
    assert state_bytes(observer) == before <= max(8 * BINS + 4, 4 * 64 * 16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_raise(kind: str, bad: float, dtype: torch.dtype) -> None:
    good = heavy_tailed(50, 3).to(dtype)
    values = good.clone()
    values[17, 1] = bad
    observer = observed(KINDS[kind], good)
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        observer.update(values)
    assert observer.count == 50
    assert torch.equal(observer.alpha(), observed(KINDS[kind], good).alpha())


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_another_form_raise(kind: str) -> None:
    observer = KINDS[kind]()
    with pytest.raises(CalibrationError, match="no values"):
        observer.alpha()
    for values in (torch.zeros(2, 3, 4), torch.zeros(3), torch.zeros(2, 3, dtype=torch.int8)):
        with pytest.raises(CalibrationError, match=r"expected floats \(T, D\)"):
            observer.update(values)
    observer.update(torch.zeros(0, 3))
    with pytest.raises(CalibrationError, match="no values"):
        observer.alpha()


@pytest.mark.parametrize("kind", ["absmax channel", "channel percentile"])
def test_channels_that_change_raise(kind: str) -> None:
    observer = observed(KINDS[kind], torch.ones(4, 3))
    with pytest.raises(CalibrationError, match="found values of 5 channels; expected 3"):
        observer.update(torch.ones(4, 5))


def test_histogram_says_when_values_leave_its_range() -> None:
    with pytest.raises(CalibrationError, match=r"magnitude 2e\+12; expected less than 1\.1e\+12"):
        Histogram().update(torch.tensor([[1.0, -2e12]]))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (AbsMax(per_channel=False), AbsMax(per_channel=True)),
        (Histogram(), Percentile(0.9)),
        (Percentile(0.9), Percentile(0.99)),
        (Octav(8), Octav(4)),
        (ChannelPercentile(0.9), ChannelPercentile(0.9, capacity=7)),
    ],
)
def test_unlike_observers_do_not_merge(left: Observer, right: Observer) -> None:
    with pytest.raises(CalibrationError, match="same kind and settings"):
        left.merge(right)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_strides(kind: str) -> None:
    values = heavy_tailed(400, 8).to(torch.bfloat16)
    plain = observed(KINDS[kind], values[::2, 1:6].float().contiguous()).alpha()
    assert torch.equal(observed(KINDS[kind], values[::2, 1:6]).alpha(), plain)
    assert torch.equal(observed(KINDS[kind], values[::2, 1:6].T.contiguous().T).alpha(), plain)


@pytest.mark.parametrize(
    ("spec", "kind", "shape"),
    [
        (QuantSpec(), AbsMax, ()),
        (QuantSpec("channel"), AbsMax, (5,)),
        (QuantSpec("tensor", "percentile", 0.99), Percentile, ()),
        (QuantSpec("channel", "percentile", 0.99), ChannelPercentile, (5,)),
        (QuantSpec("tensor", "octav"), Octav, ()),
    ],
)
def test_make_observer(spec: QuantSpec, kind: type[Observer], shape: tuple[int, ...]) -> None:
    observer = make_observer(spec)
    assert type(observer) is kind
    observer.update(heavy_tailed(200, 5))
    assert observer.alpha().shape == shape
    assert observer.alpha().dtype == torch.float32
    assert bool((numerics.scale_from_alpha(observer.alpha()) > 0).all())


def test_make_observer_of_run_time_scales_raises() -> None:
    with pytest.raises(RecipeError, match="run time"):
        make_observer(QuantSpec("token"))
