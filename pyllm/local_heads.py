"""Which heads static labels call local: those that look back least often."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Shares = NDArray[np.floating]


def top_groups(local: Shares, share: float, n_kv_heads: int) -> NDArray[np.bool_]:
    """(n_layers, n_heads): true for that share, 0..1, of the key/value heads of all layers, with all their
    query heads. local: (n_layers, n_heads), the part of the queries for which a head is local."""
    n_layers, n_heads = local.shape
    group = n_heads // n_kv_heads
    # The query heads of a key/value head together are as local as the least local of them.
    groups = local.reshape(n_layers, n_kv_heads, group).min(axis=2)
    return np.repeat(top_share(groups, share), group, axis=1)


def top_share(values: Shares, share: float) -> NDArray[np.bool_]:
    """True for that share of the entries, rounded to a whole number of them, with the highest values."""
    labels = np.zeros(values.size, bool)
    labels[np.argsort(-values, axis=None, kind="stable")[: round(share * values.size)]] = True
    return labels.reshape(values.shape)
