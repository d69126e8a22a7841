"""95 % confidence intervals of scores, and of the difference of scores on the same samples."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pyllm.guard.bounds import Z, wilson

Values = NDArray[np.float64]
Interval = tuple[float, float]


def mean_interval(scores: Values) -> Interval:
    """Of the mean of scores (n,) of 0 or 1: Wilson (1927). Of fractions between them it is wider than need
    be, as they vary less than 0 and 1 of the same mean do."""
    p = float(scores.mean())
    low, high = wilson(scores.sum(), len(scores))
    # Rounding must not put the mean outside.
    return min(p, float(low)), max(p, float(high))


def difference_interval(scores: Values, others: Values, *, fractions: bool) -> Interval:
    """Of mean(scores) − mean(others), both (n,) on the same samples.

    fractions: whether scores between 0 and 1 are possible. The task tells, not its scores: all may happen to
    be 0 or 1.
    """
    return fractions_interval(scores - others) if fractions else paired_interval(scores, others)


def fractions_interval(differences: Values) -> Interval:
    """Of the mean of differences (n,) of -1..1: the normal interval with two samples more, of 1 and -1.

    For differences of -1, 0 and 1 that is Bonett and Price, "Adjusted Wald confidence interval for a
    difference of binomial proportions based on paired data", Journal of Educational and Behavioral Statistics
    37 (2012); the variance is that of whatever differences there are. A rare loss may not have been seen yet:
    without any difference this is ±2.8 / (n + 2), where a bootstrap is 0 to 0.
    """
    n = len(differences) + 2
    mean = float(differences.sum()) / n
    variance = (float(np.square(differences).sum()) + 2) / n - mean**2
    half = Z * math.sqrt(variance / n)
    return max(-1.0, mean - half), min(1.0, mean + half)


def paired_interval(scores: Values, others: Values) -> Interval:
    """Of the difference of two proportions on the same n samples, scores and others (n,) of 0 or 1.

    Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired
    data", Statistics in Medicine 17 (1998), method 10: Wilson's intervals of both, and their correlation.
    """
    n, p, q = len(scores), float(scores.mean()), float(others.mean())
    (p_low, p_high), (q_low, q_high) = mean_interval(scores), mean_interval(others)
    phi = _correlation(scores, others, n)
    low = _side(p - p_low, q_high - q, phi)
    high = _side(p_high - p, q - q_low, phi)
    return p - q - low, p - q + high


def _side(of_one: float, of_other: float, phi: float) -> float:
    return math.sqrt(max(0.0, of_one**2 - 2 * phi * of_one * of_other + of_other**2))


def _correlation(scores: Values, others: Values, n: int) -> float:
    """φ of the table of both, corrected for continuity where it is positive; 0 where one is constant."""
    both = float((scores * others).sum())
    margins = [float(values.sum()) for values in (scores, others)]
    product = math.prod(m * (n - m) for m in margins)
    if product == 0:
        return 0.0
    # n·a − (a + b)(a + c) is the usual ad − bc.
    excess = n * both - math.prod(margins)
    if excess > 0:
        excess = max(0.0, excess - n / 2)
    return excess / math.sqrt(product)
