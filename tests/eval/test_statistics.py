"""Standard errors and paired bootstrap intervals against enumeration and the textbook."""

import itertools
import math

import numpy as np
import pytest

from quamba.errors import SizeError
from quamba.eval.statistics import Difference, paired_difference, relative_increase, standard_error


def test_standard_error_is_the_textbook_one() -> None:
    values = [1.0, 4.0, 2.0, 9.0]
    mean = sum(values) / 4
    assert standard_error(values) == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 3 / 4))
    assert math.isnan(standard_error([3.0]))


def test_the_interval_is_that_of_all_resamples() -> None:
    values, reference, weights = np.array([1.0, 5.0, 2.0, 2.5]), np.array([0.5, 1.0, 2.5, 0.0]), [3.0, 1.0, 2.0, 1.0]
    found = paired_difference(values, reference, weights=weights, resamples=200_000, confidence=0.8, seed=3)
    means = []
    for drawn in itertools.product(range(4), repeat=4):
        total = sum(weights[i] for i in drawn)
        means.append(sum(weights[i] * (values[i] - reference[i]) for i in drawn) / total)
    assert found.mean == pytest.approx(float(np.average(values - reference, weights=weights)))
    low, high = np.quantile(means, [0.1, 0.9])
    assert (found.low, found.high) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))


def test_what_all_items_share_cancels() -> None:
    hard = np.random.default_rng(0).normal(size=50) * 100
    found = paired_difference(hard + 0.5, hard)
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        sample = generator.normal(loc=0.3, size=60)
        found = paired_difference(sample, np.zeros(60), resamples=400, confidence=0.9, seed=trial)
        covered += found.low <= 0.3 <= found.high
    assert 165 <= covered <= 194


def test_the_seed_decides() -> None:
    values, reference = np.arange(9.0) ** 2, np.zeros(9)
    assert paired_difference(values, reference, seed=1) == paired_difference(values, reference, seed=1)
    assert paired_difference(values, reference, seed=1) != paired_difference(values, reference, seed=2)


def test_one_pair_has_no_interval() -> None:
    found = paired_difference([2.0], [0.5])
    assert found.mean == 1.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_relative_increase_is_that_of_the_perplexity() -> None:
    found = relative_increase(Difference(math.log(1.2), math.log(1.1), math.log(1.5)))
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.1, 0.5))


@pytest.mark.parametrize(
    ("values", "reference", "weights"), [([1.0, 2.0], [1.0], None), ([], [], None), ([1.0, 2.0], [1.0, 2.0], [1.0])]
)
def test_unequal_lengths_raise(values: list[float], reference: list[float], weights: list[float] | None) -> None:
    with pytest.raises(SizeError, match="one length"):
        paired_difference(values, reference, weights=weights)
