"""Sums over audits: rates, means and quantiles with confidence bounds, per layer and head."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.guard.audit import Audit
from pyllm.guard.bounds import wilson

# Upper ends of the classes in which lost shares are counted: 0.0001 to 1, ten to a factor of ten.
EDGES = np.logspace(-4, 0, 41)

Counts = NDArray[np.int64]
Rates = NDArray[np.float64]


@dataclass(frozen=True)
class Tally:
    """Counts since a guard was set up, per (layer, head) unless said; two of them subtract.

    audits: audited tokens that had a bulk and were not made dense by a repair. local, missed, page_missed: of
    these, as `Audit` has them. lost_sum: of lost shares; lost_classes (n_layers, n_heads, 41): how many were
    at most each of EDGES but more than the one before. over_limit: audits that asked for a repair; repairs,
    and tokens evaluated again for them.
    """

    audits: int
    local: Counts
    missed: Counts
    page_missed: Counts
    lost_sum: NDArray[np.float64]
    lost_classes: Counts
    over_limit: int = 0
    repairs: int = 0
    repaired_tokens: int = 0

    @classmethod
    def empty(cls, n_layers: int, n_heads: int) -> Tally:
        shape = (n_layers, n_heads)
        local, missed, page_missed = (np.zeros(shape, np.int64) for _ in range(3))
        return cls(0, local, missed, page_missed, np.zeros(shape), np.zeros((*shape, len(EDGES)), np.int64))

    def with_audit(self, audit: Audit, over_limit: bool) -> Tally:
        classes = np.searchsorted(EDGES, audit.lost)[..., None] == np.arange(len(EDGES))
        return replace(
            self,
            audits=self.audits + 1,
            local=self.local + audit.local,
            missed=self.missed + audit.missed,
            page_missed=self.page_missed + audit.page_missed,
            lost_sum=self.lost_sum + audit.lost,
            lost_classes=self.lost_classes + classes,
            over_limit=self.over_limit + over_limit,
        )

    def with_repair(self, n_tokens: int) -> Tally:
        return replace(self, repairs=self.repairs + 1, repaired_tokens=self.repaired_tokens + n_tokens)

    def __sub__(self, before: Tally) -> Tally:
        return self._with(before, operator.sub)

    def __add__(self, other: Tally) -> Tally:
        return self._with(other, operator.add)

    def _with(self, other: Tally, combine: Callable[[Any, Any], Any]) -> Tally:
        names = [f.name for f in fields(self)]
        return Tally(**{name: combine(getattr(self, name), getattr(other, name)) for name in names})

    # ---- what the sums say; None and NaN where nothing was audited ----

    @property
    def miss_rate(self) -> float | None:
        """Of all audited (query, head) pairs: those called local against the promise."""
        return float(self.missed.sum() / (self.audits * self.missed.size)) if self.audits else None

    @property
    def page_miss_rate(self) -> float | None:
        """Of the same pairs: those long, whose pages hold less than the promise."""
        return float(self.page_missed.sum() / (self.audits * self.missed.size)) if self.audits else None

    @property
    def lost_share(self) -> float | None:
        """Mean over all audited pairs."""
        return float(self.lost_sum.sum() / (self.audits * self.lost_sum.size)) if self.audits else None

    def summary(self) -> dict[str, Any]:
        """The numbers of all layers and heads together."""
        names = (
            "audits",
            "miss_rate",
            "page_miss_rate",
            "lost_share",
            "over_limit",
            "repairs",
            "repaired_tokens",
        )
        return {name: getattr(self, name) for name in names}

    def miss_rates(self) -> tuple[Rates, Rates, Rates]:
        """Rate and its 95 % bounds (Wilson's), each (n_layers, n_heads)."""
        return _rate(self.missed, self.audits), *wilson(self.missed, self.audits)

    def lost_means(self) -> tuple[Rates, Rates, Rates]:
        """Mean lost share and its 95 % bounds (Wilson's, which hold for shares), each (n_layers, n_heads)."""
        return _rate(self.lost_sum, self.audits), *wilson(self.lost_sum, self.audits)

    def lost_quantiles(self, q: float = 0.99) -> tuple[Rates, Rates, Rates]:
        """The lost share that a part q of the audits does not exceed, to the class above, and its 95 %
        bounds.

        Each (n_layers, n_heads): where the part at most so large, or one of its bounds, reaches q.
        """
        at_most = self.lost_classes.cumsum(axis=-1)
        low, high = wilson(at_most, self.audits)
        return _first(_rate(at_most, self.audits), q), _first(high, q), _first(low, q)


def _rate(part: NDArray[Any], n: int) -> Rates:
    return part / n if n else np.full(part.shape, np.nan)


def _first(part: Rates, q: float) -> Rates:
    """The first edge at which part (..., 41), which ascends, reaches q; the last one where none does."""
    reached = part >= q
    at = np.where(reached.any(axis=-1), reached.argmax(axis=-1), len(EDGES) - 1)
    return np.where(np.isnan(part[..., 0]), np.nan, EDGES[at])
