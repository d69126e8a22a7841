"""Confidence intervals of scores: against published values, and what holds for all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pyllm.evaluate.intervals import difference_interval, mean_interval, paired_interval

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


@given(zeros_and_ones)
def test_intervals_hold_the_estimate(pair: np.ndarray) -> None:
    one, other = pair
    low, high = mean_interval(one)
    assert 0 <= low <= one.mean() <= high <= 1
    assert low < high
    low, high = difference_interval(one, other, 0)
    assert -1 <= low <= one.mean() - other.mean() <= high <= 1
    assert low < high
    assert difference_interval(other, one, 0) == pytest.approx((-high, -low))


def test_a_bootstrap_for_fractions() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.choice([0, 0.25, 0.5, 1], (2, 400))
    low, high = difference_interval(one, other, 0)
    spread = (one - other).std() / 20
    assert low == pytest.approx((one - other).mean() - 1.96 * spread, abs=0.2 * spread)
    assert high == pytest.approx((one - other).mean() + 1.96 * spread, abs=0.2 * spread)
    assert difference_interval(one, one, 0) == (0, 0)
