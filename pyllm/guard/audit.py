"""What an audit finds, for one token: which heads did not read what was promised, and what they lost.

All shares are parts of one query head's whole attention, from the true scores of every key. A head keeps the
promise τ* when what it read holds a share of at least τ*.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyllm.record import Record


@dataclass(frozen=True)
class Audit:
    """local: the head was called local. missed: it was, and its true local share is under the promise.
    page_missed: it was long, and the pages it read with sinks and window hold less than the promise. lost:
    share that was not read. All (n_layers, n_heads)."""

    position: int
    local: NDArray[np.bool_]
    missed: NDArray[np.bool_]
    page_missed: NDArray[np.bool_]
    lost: NDArray[np.float32]
    sampled: bool = True  # drawn, so that it is evidence of how often; not asked for

    @property
    def worst(self) -> float:
        """The largest of all layers' lost shares, each the mean of its heads."""
        return float(self.lost.mean(axis=1).max())


def audits(record: Record, first: int, promise: float) -> list[Audit]:
    """Of a record's audited tokens that have a bulk; `first` is the position of its first token."""
    lost = np.minimum(record.lost_share, 1)
    audited = [int(i) for i in np.flatnonzero(record.audit) if not np.isnan(lost[:, i]).any()]
    return [_audit(first + i, ~record.is_long[:, i], lost[:, i], promise) for i in audited]


def _audit(position: int, local: NDArray[np.bool_], lost: NDArray[np.float32], promise: float) -> Audit:
    broken = lost > 1 - promise
    return Audit(position, local, broken & local, broken & ~local, lost)
