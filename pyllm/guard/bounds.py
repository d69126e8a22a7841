"""How sure a rate from a sample is."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z = 1.959963984540054  # two-sided 95 % of a normal variable


def wilson(total: ArrayLike, n: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95 % score interval (Wilson, 1927) of a rate that was total / n in n draws; NaN where n is 0.

    Also holds for the mean of values in 0..1 whose sum is `total`: their variance is at most that of a rate
    with the same mean, so that the interval is too wide rather than too narrow.
    """
    total, n = np.asarray(total, np.float64), np.asarray(n, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = total / n
        center = rate + Z**2 / (2 * n)
        spread = Z * np.sqrt(np.maximum(rate * (1 - rate), 0) / n + Z**2 / (4 * n**2))
        scale = 1 + Z**2 / n
        low, high = (center - spread) / scale, (center + spread) / scale
    return np.clip(low, 0, 1), np.clip(high, 0, 1)
