"""The rows of the comparison: each policy with its settings. A new policy or form is one more entry here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.attention import (
    GRADED,
    GRANULARITIES,
    Adaptive,
    Dense,
    Oracle,
    PageBits,
    Policy,
    Static,
    Window,
    page_tier,
    require_page_bits,
)
from pyllm.calibration import MOMENTS, Calibration
from pyllm.errors import ArgumentError
from pyllm.local_heads import top_groups, top_share

THRESHOLDS = (0.6, 0.8, 0.9, 0.95)
SHARES = (0.2, 0.4, 0.6, 0.8)
PAGE_SHARES = (0.002, 0.005, 0.01, 0.02)
PAGE_BITS: tuple[PageBits, ...] = (GRADED,)
GATE = 0.9  # the threshold of the head tier before the page tier, the method's default


@dataclass(frozen=True)
class Candidate:
    """A policy to compare. line: what joins it with its like in the plot; setting: what differs in that
    line."""

    line: str
    policy: Policy
    setting: float | None = None

    @property
    def key(self) -> tuple[str, float | None]:
        return self.line, self.setting

    @property
    def name(self) -> str:
        return self.line if self.setting is None else f"{self.line} {self.setting:g}"


@dataclass(frozen=True)
class Choice:
    """What the rows are made of. thresholds: of oracle and adaptive, >= 0. shares: of heads that static
    labels call local, 0..1. page_shares, decode_shares, page_bits: of the page tier, as policies take them;
    without decode_shares each page share holds in decode too."""

    window: int = 1024
    sinks: int = 16
    policies: Sequence[str] = ("dense", "window", "static", "oracle", "adaptive", "pages", "adaptive+pages")
    thresholds: Sequence[float] = THRESHOLDS
    shares: Sequence[float] = SHARES
    page_shares: Sequence[float] = PAGE_SHARES
    decode_shares: Sequence[float] = ()
    page_bits: Sequence[PageBits] = PAGE_BITS

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
        for bits in self.page_bits:
            require_page_bits(bits)
        for share in self.page_shares:
            Dense(page_share=share)
        for share in self.decode_shares:
            Dense(decode_share=share)

    @property
    def geometry(self) -> dict[str, Any]:
        """What all policies have in common."""
        return {"window": self.window, "sinks": self.sinks}


@dataclass(frozen=True)
class Fitted:
    """What is known of the model, from other text than the evaluated one.

    local: (n_layers, n_heads), the share of queries for which the oracle called a head local; static rows
    need it. calibrations: by the moments they were fitted with; `calibrated` tells which rows need them.
    """

    n_kv_heads: int = 1
    local: NDArray[np.float64] | None = None
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)


Rows = Callable[[Choice, Fitted], Iterator[Candidate]]

# The adaptive rule's estimates, by the name of their rows.
FORMS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "frozen": {"gaussian": "frozen"},
    "truncated": {"gaussian": "truncated"},
    "regression": {"estimate": "regression"},
    "maximum": {"estimate": "maximum"},
    "calibrated": {"moments": "calibrated"},
    "calibrated-maximum": {"moments": "calibrated", "estimate": "maximum"},
}
# Those that need a calibration, and the moments it is fitted with.
CALIBRATED = {
    name: options.get("moments", "prompt")
    for name, options in FORMS.items()
    if "estimate" in options or "moments" in options
}


PAGE_ROWS = ("pages", "adaptive+pages")


def calibrated(name: str, choice: Choice) -> str | None:
    """The moments of the calibration that the rows of this name need, None where they need none."""
    if name in PAGE_ROWS and GRADED in choice.page_bits:
        return "prompt"
    return CALIBRATED.get(name)


def candidates(choice: Choice, fitted: Fitted | None = None) -> list[Candidate]:
    """Every row, in the order of the table."""
    return [row for name in choice.policies for row in ROWS[name](choice, fitted or Fitted())]


def keys(choice: Choice) -> list[tuple[str, float | None]]:
    """Of every row, before anything is fitted: what that says does not change what rows are called."""
    blank = np.zeros((1, 1, 1))
    calibrations = {
        moments: Calibration(np.zeros((1, 1, 3)), blank, blank[None], blank, blank, blank, (0, 1), moments)
        for moments in MOMENTS
    }
    return [candidate.key for candidate in candidates(choice, Fitted(1, blank[0], calibrations))]


def _dense(choice: Choice, fitted: Fitted) -> Iterator[Candidate]:
    yield Candidate("dense", Dense(**choice.geometry))


def _window(choice: Choice, fitted: Fitted) -> Iterator[Candidate]:
    yield Candidate("window", Window(**choice.geometry))


def _tiers(choice: Choice, fitted: Fitted) -> Iterator[tuple[str, dict[str, Any], float]]:
    """The page tiers: what a line is called, what a policy takes, and its setting."""
    calibration = fitted.calibrations.get("prompt")
    decode_shares = choice.decode_shares or (None,)
    for bits, decode_share, share in itertools.product(choice.page_bits, decode_shares, choice.page_shares):
        name = GRADED if bits == GRADED else f"{bits}-bit"
        if decode_share is not None:
            name += f", {decode_share:g} in decode"
        yield name, page_tier(bits, share, calibration, decode_share), share


def _pages(choice: Choice, fitted: Fitted) -> Iterator[Candidate]:
    for name, tier, share in _tiers(choice, fitted):
        yield Candidate(f"pages {name}", Dense(**choice.geometry, **tier), share)


def _gated_pages(choice: Choice, fitted: Fitted) -> Iterator[Candidate]:
    for name, tier, share in _tiers(choice, fitted):
        yield Candidate(f"adaptive+pages {name}", Adaptive(GATE, "group", **choice.geometry, **tier), share)


def _static(choice: Choice, fitted: Fitted) -> Iterator[Candidate]:
    local = fitted.local
    if local is None:
        raise ValueError("static rows need the share of queries for which each head is local")
    for share in choice.shares:
        yield Candidate("static head", Static(top_share(local, share), **choice.geometry), share)
    for share in choice.shares:
        labels = top_groups(local, share, fitted.n_kv_heads)
        yield Candidate("static group", Static(labels, **choice.geometry), share)


def _oracle(choice: Choice, fitted: Fitted) -> Iterator[Candidate]:
    for granularity, threshold in itertools.product(GRANULARITIES, choice.thresholds):
        policy = Oracle(threshold, granularity, **choice.geometry)
        yield Candidate(f"oracle {granularity}", policy, threshold)


def adaptive(name: str, choice: Choice, fitted: Fitted) -> Adaptive:
    """The rule with a form of its estimate."""
    calibration = fitted.calibrations[CALIBRATED[name]] if name in CALIBRATED else None
    return Adaptive(**choice.geometry, **FORMS[name], calibration=calibration)


def _adaptive(name: str) -> Rows:
    def rows(choice: Choice, fitted: Fitted) -> Iterator[Candidate]:
        policy = adaptive(name, choice, fitted)
        for granularity, threshold in itertools.product(GRANULARITIES, choice.thresholds):
            with_threshold = replace(policy, threshold=threshold, granularity=granularity)
            yield Candidate(f"{name} {granularity}", with_threshold, threshold)

    return rows


ROWS: dict[str, Rows] = {
    "dense": _dense,
    "window": _window,
    "static": _static,
    "oracle": _oracle,
    **{name: _adaptive(name) for name in FORMS},
    "pages": _pages,
    "adaptive+pages": _gated_pages,
}
