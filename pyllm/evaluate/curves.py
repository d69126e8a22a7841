"""What measured points predict: the page tier over its share, and a gate in some bands of layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyllm.attention import PageBits

HUGE = 50.0  # a logarithm, of more than anybody pays or loses: steep lines go on to more than floats hold
BELOW = 5.0  # logarithms of shares that a curve goes on below the smallest measured one


@dataclass(frozen=True)
class Bands:
    """A gate in one band of layers at a time. loss: (n_bands,) nats, > 0, as decode counts them. saved:
    (n_bands,) the part of dense attention's cost that it saves."""

    loss: NDArray[np.float64]
    saved: NDArray[np.float64]

    def chosen(self, budget: float) -> tuple[list[int], float]:
        """Bands, the ones that lose least for what they save first, whose losses sum to at most the budget;
        and what they save together."""
        chosen: list[int] = []
        left = budget
        useful = np.flatnonzero(self.saved > 0)
        for at in sorted(useful, key=lambda at: self.loss[at] / self.saved[at]):
            if self.loss[at] <= left:
                chosen.append(int(at))
                left -= self.loss[at]
        return sorted(chosen), float(self.saved[chosen].sum())


@dataclass(frozen=True)
class Curve:
    """Loss and cost of the page tier over its share, between what was measured straight lines of the
    logarithms; beyond, the nearest piece goes on. All (n,), n >= 2, by share."""

    log_share: NDArray[np.float64]
    log_loss: NDArray[np.float64]
    log_cost: NDArray[np.float64]

    @classmethod
    def of(cls, points: Mapping[float, tuple[float, float]]) -> Curve:
        """points: loss and cost, both above 0, by share."""
        shares = sorted(points)
        # Noise aside, who reads less loses more and costs less.
        loss = np.maximum.accumulate([points[share][0] for share in shares])
        cost = np.minimum.accumulate([points[share][1] for share in shares])
        return cls(np.log(shares), np.log(loss), np.log(cost))

    def cost(self, share: float) -> float:
        return math.exp(min(_line(math.log(share), self.log_share, self.log_cost), HUGE))

    def share(self, loss: float) -> float:
        """The largest that loses no more, at most 1 and not far below what was measured; of three digits."""
        # Where the loss stands still for a while, its line has no inverse: a little slope gives it one.
        rising = self.log_loss + 1e-6 * np.arange(len(self.log_loss))
        log_share = _line(math.log(loss), rising, self.log_share)
        return float(f"{math.exp(min(max(log_share, self.log_share[0] - BELOW), 0.0)):.3g}")


@dataclass(frozen=True)
class Pages:
    """The page tier by a sketch of these bits, in prefill and in decode, each with a share of its own.

    decode: by what its own share loses, without what it loses for a prompt that was read with loss.
    """

    bits: PageBits
    prefill: Curve
    decode: Curve

    def cost(self, shares: tuple[float, float]) -> float:
        return (self.prefill.cost(shares[0]) + self.decode.cost(shares[1])) / 2


def _line(x: float, xs: NDArray[np.float64], ys: NDArray[np.float64]) -> float:
    """y at x on the straight lines through (xs, ys), xs rising; the outer ones go on."""
    at = int(np.clip(np.searchsorted(xs, x), 1, len(xs) - 1))
    slope = (ys[at] - ys[at - 1]) / (xs[at] - xs[at - 1])
    return float(ys[at - 1] + slope * (x - xs[at - 1]))
