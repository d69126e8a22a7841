"""How far one next-token distribution is from another, token by token, and how sure the mean is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyllm.guard.bounds import Z

BLOCK = 64  # tokens; neighbours resemble each other, blocks of this length hardly do
ROWS = 16  # tokens compared at once: few enough that a large vocabulary's rows stay in the cache

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Scores:
    """Of n tokens. kl: KL(dense ‖ other) of the next token, in nats. agrees: whether both find the same token
    likeliest. nll, dense_nll: −ln of the probability that each gave to the token that came."""

    kl: NDArray[np.float64]
    agrees: NDArray[np.bool_]
    nll: NDArray[np.float64]
    dense_nll: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.kl)

    @classmethod
    def joined(cls, parts: Iterable[Scores]) -> Scores:
        """One after another; empty for no parts."""
        parts = list(parts)
        empty = np.empty(0)
        return cls(
            np.concatenate([empty, *(part.kl for part in parts)]),
            np.concatenate([np.empty(0, bool), *(part.agrees for part in parts)]),
            np.concatenate([empty, *(part.nll for part in parts)]),
            np.concatenate([empty, *(part.dense_nll for part in parts)]),
        )


class Reference:
    """Dense attention's distributions for some tokens, to compare several others with.

    logits: (n, n_vocab). targets: (n,) the tokens that came next. Holds one more array of the logits' size.
    """

    def __init__(self, logits: Logits, targets: NDArray[np.integer]) -> None:
        self.logits, self.targets = logits, targets
        self.log_sum = np.empty(len(logits))
        self.best = np.empty(len(logits), np.int64)
        self.p = np.empty_like(logits)
        for rows in _slices(len(logits)):
            x = logits[rows]
            self.log_sum[rows] = _log_sum(x)
            self.best[rows] = x.argmax(axis=1)
            np.exp(x - self.log_sum[rows, None].astype(np.float32), out=self.p[rows])

    def compare(self, logits: Logits) -> Scores:
        """logits: (n, n_vocab) for the same tokens."""
        n = len(self.logits)
        if logits.shape != self.logits.shape:
            raise ValueError(f"logits of shape {logits.shape}, but dense attention's are {self.logits.shape}")
        kl, log_sum, agrees = np.empty(n), np.empty(n), np.empty(n, bool)
        for rows in _slices(n):
            x, y = self.logits[rows], logits[rows]
            log_sum[rows] = _log_sum(y)
            agrees[rows] = y.argmax(axis=1) == self.best[rows]
            kl[rows] = (self.p[rows] * (x - y)).sum(axis=1, dtype=np.float64)
        # Σ p (ln p − ln q), with ln p = x − log_sum(x) and ln q = y − log_sum(y)
        kl += log_sum - self.log_sum
        return Scores(kl, agrees, self._nll(logits, log_sum), self._nll(self.logits, self.log_sum))

    def _nll(self, logits: Logits, log_sum: NDArray[np.float64]) -> NDArray[np.float64]:
        nll: NDArray[np.float64] = log_sum - logits[np.arange(len(logits)), self.targets]
        return nll


def perplexity(nll: NDArray[np.float64]) -> float:
    """exp of the mean of nll (n,), n >= 1."""
    return float(np.exp(nll.mean()))


def blocks_interval(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean of values (n,) >= 0, which stand in the order of the text: of
    blocks, as neighbouring tokens are not independent. None for fewer than two blocks."""
    starts = np.arange(0, len(values), BLOCK)
    if len(starts) < 2:
        return None
    return ratio_interval(np.add.reduceat(values, starts), np.diff(np.append(starts, len(values))))


def ratio_interval(sums: NDArray[np.float64], counts: NDArray[np.integer]) -> tuple[float, float]:
    """95 % confidence interval of Σ sums / Σ counts, both (n,), n >= 2, of n independent parts, sums >= 0.

    Student's t on the ratio's logarithm, as few parts hold most of a divergence: where parts of one size are
    lognormal with a deviation of 1, 8 of them have the ratio below the upper end in 90 % of cases, where a
    bootstrap has it in 79 %.
    """
    n, ratio = len(sums), float(sums.sum() / counts.sum())
    if ratio <= 0:
        return ratio, ratio
    variance = n / (n - 1) * float(np.square(sums - ratio * counts).sum()) / float(counts.sum()) ** 2
    half = student(n - 1) * math.sqrt(variance) / ratio
    return ratio * math.exp(-half), ratio * math.exp(half)


def student(n: int) -> float:
    """97.5 % quantile of Student's t with n >= 1 degrees of freedom: exact for 1 and 2, else the expansion of
    Abramowitz and Stegun, 26.7.5, whose error is below 1 %."""
    if n < 3:
        return (12.7062, 4.3027)[n - 1]
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
    )
    return float(Z + sum(term / n ** (power + 1) for power, term in enumerate(terms)))


def _log_sum(x: Logits) -> NDArray[np.float64]:
    """ln Σ exp of every row."""
    highest = x.max(axis=1)
    total = np.exp(x - highest[:, None]).sum(axis=1, dtype=np.float64)
    result: NDArray[np.float64] = highest + np.log(total)
    return result


def _slices(n: int) -> Iterable[slice]:
    return (slice(first, first + ROWS) for first in range(0, n, ROWS))
