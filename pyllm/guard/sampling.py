"""Which positions are audited: known beforehand, the same for the same seed, whatever is evaluated there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def audit_mask(first: int, stop: int, interval: int, seed: int) -> NDArray[np.bool_]:
    """(stop − first,) bool, True at the audited ones of positions [first, stop).

    One in every stratum of `interval` positions, drawn by a hash of seed and stratum: every position is as
    likely as any other, and two audits are never 2 * interval positions apart.
    """
    position = np.arange(first, stop, dtype=np.uint64)
    stratum, at = np.divmod(position, np.uint64(interval))
    mask: NDArray[np.bool_] = at == _hash(stratum, seed) % np.uint64(interval)
    return mask


def _hash(x: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """The x-th output of splitmix64 (Steele, Lea and Flood, 2014) from a hashed seed."""
    start = _mix(np.array([seed % 2**64], np.uint64))
    return _mix(start + (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
