"""Confidence intervals of scores: against published values, and what holds for all."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pyllm.evaluate.intervals import difference_interval, fractions_interval, mean_interval, paired_interval

zeros_and_ones = arrays.arrays(np.float64, (2, 20), elements=st.sampled_from([0.0, 1.0]))


def test_wilsons_published_values() -> None:
    """Newcombe, Statistics in Medicine 17 (1998), 857-872, table I: Wilson's score, without correction."""
    for hits, n, expected in ((81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611)),
                              (1, 29, (0.0061, 0.1718))):  # fmt: skip
        scores = np.repeat([1.0, 0.0], [hits, n - hits])
        assert mean_interval(scores) == pytest.approx(expected, abs=5e-5)


def table(a: int, b: int, c: int, d: int) -> np.ndarray:
    """(2, n): both right, only the first, only the second, none."""
    return np.repeat([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]], [a, b, c, d], axis=1)


def test_newcombes_published_values() -> None:
    """Newcombe, Statistics in Medicine 17 (1998), 2635-2650, method 10."""
    assert paired_interval(*table(36, 12, 2, 0)) == pytest.approx((0.0569, 0.3404), abs=5e-5)


@pytest.mark.parametrize("fractions", [False, True])
@given(pair=zeros_and_ones)
def test_intervals_hold_the_estimate(fractions: bool, pair: np.ndarray) -> None:
    one, other = pair
    low, high = mean_interval(one)
    assert 0 <= low <= one.mean() <= high <= 1
    assert low < high
    low, high = difference_interval(one, other, fractions=fractions)
    assert -1 <= low <= one.mean() - other.mean() <= high <= 1
    assert low < high
    assert difference_interval(other, one, fractions=fractions) == pytest.approx((-high, -low))


def test_of_many_fractions_the_normal_interval() -> None:
    differences = np.subtract(*np.random.default_rng(0).choice([0, 0.25, 0.5, 1], (2, 4000)))
    half = 1.96 * differences.std() / math.sqrt(4000)
    mean = differences.mean()
    assert fractions_interval(differences) == pytest.approx((mean - half, mean + half), abs=0.02 * half)


@pytest.mark.parametrize("n", [20, 200])
@pytest.mark.parametrize("rate", [0.0, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("size", [0.25, 1.0])
def test_intervals_of_fractions_cover_rare_losses(n: int, rate: float, size: float) -> None:
    """With a loss in one of a hundred, 200 samples have none in 13 % of the cases: a bootstrap is 0 to 0."""
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(1000):
        low, high = fractions_interval(np.where(rng.random(n) < rate, -size, 0.0))
        covered += low <= -size * rate <= high
    assert covered >= 930
