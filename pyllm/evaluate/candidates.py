"""The rows of the comparison: each policy with its settings. A new policy or form is one more entry here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.attention import GRANULARITIES, Adaptive, Dense, Oracle, Policy, Static, Window
from pyllm.errors import ArgumentError

THRESHOLDS = (0.6, 0.8, 0.9, 0.95)
SHARES = (0.2, 0.4, 0.6, 0.8)
PAGE_SHARES = (0.002, 0.005, 0.01, 0.02)
PAGE_BITS = (3,)
GATE = 0.9  # the threshold of the head tier before the page tier, the method's default


@dataclass(frozen=True)
class Candidate:
    """A policy to compare. line: what joins it with its like in the plot; setting: what differs in that
    line."""

    line: str
    policy: Policy
    setting: float | None = None

    @property
    def name(self) -> str:
        return self.line if self.setting is None else f"{self.line} {self.setting:g}"


@dataclass(frozen=True)
class Choice:
    """What the rows are made of. thresholds: of oracle and adaptive, >= 0. shares: of heads that static
    labels call local, 0..1. page_shares, page_bits: of the page tier, as policies take them."""

    window: int = 1024
    sinks: int = 16
    policies: Sequence[str] = ("dense", "window", "static", "oracle", "adaptive", "pages", "adaptive+pages")
    thresholds: Sequence[float] = THRESHOLDS
    shares: Sequence[float] = SHARES
    page_shares: Sequence[float] = PAGE_SHARES
    page_bits: Sequence[int] = PAGE_BITS

    def __post_init__(self) -> None:
        for name in self.policies:
            if name not in ROWS:
                raise ArgumentError(f"policy {name!r} is unknown; there are {', '.join(ROWS)}")
        for threshold in self.thresholds:
            Adaptive(threshold)  # refuses what is out of range
        for share in self.shares:
            if not 0 <= share <= 1:
                raise ArgumentError(f"share of local heads: expected 0 to 1, got {share:g}")
        Dense(**self.geometry)
        for bits, share in itertools.product(self.page_bits, self.page_shares):
            Dense(page_bits=bits, page_share=share)

    @property
    def geometry(self) -> dict[str, Any]:
        """What all policies have in common."""
        return {"window": self.window, "sinks": self.sinks}


# local (n_layers, n_heads): how often the oracle called each head local, on other text
Rows = Callable[[Choice, "NDArray[np.float64] | None", int], Iterator[Candidate]]


def candidates(
    choice: Choice, local: NDArray[np.float64] | None = None, n_kv_heads: int = 1
) -> list[Candidate]:
    """Every row, in the order of the table.

    local: (n_layers, n_heads), the share of queries for which the oracle called a head local, on other text;
    needed for "static" only. Raises ArgumentError where there is none.
    """
    rows = [row for name in choice.policies for row in ROWS[name](choice, local, n_kv_heads)]
    if not rows:
        raise ArgumentError("nothing to evaluate: no policy, threshold or share was given")
    return rows


def _dense(choice: Choice, local: NDArray[np.float64] | None, n_kv_heads: int) -> Iterator[Candidate]:
    yield Candidate("dense", Dense(**choice.geometry))


def _window(choice: Choice, local: NDArray[np.float64] | None, n_kv_heads: int) -> Iterator[Candidate]:
    yield Candidate("window", Window(**choice.geometry))


def _pages(choice: Choice, local: NDArray[np.float64] | None, n_kv_heads: int) -> Iterator[Candidate]:
    for bits, share in itertools.product(choice.page_bits, choice.page_shares):
        policy = Dense(**choice.geometry, page_bits=bits, page_share=share)
        yield Candidate(f"pages {bits}-bit", policy, share)


def _gated_pages(choice: Choice, local: NDArray[np.float64] | None, n_kv_heads: int) -> Iterator[Candidate]:
    for bits, share in itertools.product(choice.page_bits, choice.page_shares):
        policy = Adaptive(GATE, "group", **choice.geometry, page_bits=bits, page_share=share)
        yield Candidate(f"adaptive+pages {bits}-bit", policy, share)


def _static(choice: Choice, local: NDArray[np.float64] | None, n_kv_heads: int) -> Iterator[Candidate]:
    if local is None:
        raise ValueError("static rows need the share of queries for which each head is local")
    n_layers, n_heads = local.shape
    group = n_heads // n_kv_heads
    # The query heads of a key/value head together are as local as the least local of them.
    groups = local.reshape(n_layers, n_kv_heads, group).min(axis=2)
    for share in choice.shares:
        yield Candidate("static head", Static(top_share(local, share), **choice.geometry), share)
    for share in choice.shares:
        labels = np.repeat(top_share(groups, share), group, axis=1)
        yield Candidate("static group", Static(labels, **choice.geometry), share)


def _thresholded(kind: type[Oracle] | type[Adaptive]) -> Rows:
    def rows(choice: Choice, local: NDArray[np.float64] | None, n_kv_heads: int) -> Iterator[Candidate]:
        for granularity in GRANULARITIES:
            for threshold in choice.thresholds:
                policy = kind(threshold, granularity, **choice.geometry)
                yield Candidate(f"{kind.name} {granularity}", policy, threshold)

    return rows


ROWS: dict[str, Rows] = {
    "dense": _dense,
    "window": _window,
    "static": _static,
    "oracle": _thresholded(Oracle),
    "adaptive": _thresholded(Adaptive),
    "pages": _pages,
    "adaptive+pages": _gated_pages,
}


def top_share(values: NDArray[np.float64], share: float) -> NDArray[np.bool_]:
    """True for that share of the entries, rounded to a whole number of them, with the highest values."""
    labels = np.zeros(values.size, bool)
    labels[np.argsort(-values, axis=None, kind="stable")[: round(share * values.size)]] = True
    return labels.reshape(values.shape)
