"""The controller: thresholds that follow what audits find (adaptive conformal inference, arXiv 2106.00170).

A head is local iff L − M̂ >= ln(τ/(1−τ)), so on that scale a threshold is a margin in nats, and errors of the
estimate are distances on it. Once per control period every layer's margins move by

    η (miss − α),    miss: pairs called local against the promise / all audited (query, head) pairs with a
    bulk

A rate of all pairs falls with growing τ, from the rate of truly long heads at τ = 0 to 0 at τ > 1, and is
defined wherever there were audits. (A rate of the heads called local would be undefined where none is, and
need not fall.) Long heads that read pages have their rate, page_miss, over the same pairs, and page_share
and decode_share follow it on the same scale, both by the same distance, but never above what the policy says:
a share is chosen for what it costs in divergence, as `pyllm calibrate` does, and in decode, where one token
decides what is read, the same rate costs more than in prefill.

Where some heads may be local, those whose threshold is above 1 never are, and stay so: whoever set them
apart, as `pyllm calibrate` does, measured what opening them costs in divergence, which no miss rate tells.
Where none may be local that is only the strictest start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyllm.attention import NEVER_LOCAL, Policy
from pyllm.guard.audit import Audit

# Nats by which a margin sinks in a control period without a miss: η = DRIFT / α. From everything long to a
# usual threshold is then some 25 periods, and a miss among the usual 36 pairs of a period moves half a nat.
DRIFT = 0.25
# Margins end here: beyond, all heads are long (τ > 1) or local (τ = 0).
MARGIN = 8.0
# ln(ε/(1−ε)) of a page share, as it counts; at the low end long heads read everything.
PAGE_MARGIN = (-12.0, 0.0)
PAGE_SHARES = ("page_share", "decode_share")
# Nats by which a repair tightens what it found at fault, beside what the step does.
TIGHTEN = 1.0


@dataclass(frozen=True)
class Control:
    """Distances from what the policy says, in nats: shift (n_layers,), of its margins; page_shift, of
    ln(ε/(1−ε)) of its page shares. Zero is the policy itself."""

    shift: NDArray[np.float64]
    page_shift: float = 0.0

    @classmethod
    def none(cls, n_layers: int) -> Control:
        return cls(np.zeros(n_layers))


class Controller:
    """For one policy. What it has no threshold for stays as it is.

    target: α. lost_limit: the lost share of a layer above which an audit asks for a repair.
    """

    def __init__(self, policy: Policy, n_layers: int, n_heads: int, target: float, lost_limit: float) -> None:
        self._native = policy.native(n_layers, n_heads)
        self._target, self._lost_limit = target, lost_limit
        thresholds = self._native["thresholds"]
        self._margins = None if thresholds is None else logit(thresholds, -MARGIN, MARGIN)
        self._moves = ~never_local(np.zeros((n_layers, n_heads)) if thresholds is None else thresholds)
        self._pages = bool(self._native.get("page_bits"))
        shares = {name: self._native[name] for name in PAGE_SHARES if name in self._native}
        self._page_margins = {name: float(logit(share, *PAGE_MARGIN)) for name, share in shares.items()}

    def step(self, control: Control, audits: Sequence[Audit]) -> Control:
        """After a control period with these audits."""
        if not audits:
            return control
        rate = DRIFT / self._target
        missed = np.mean([audit.missed.mean(axis=1) for audit in audits], axis=0)  # (n_layers,)
        page_missed = float(np.mean([audit.page_missed.mean() for audit in audits]))
        shift = control.shift + rate * (missed - self._target) + TIGHTEN * self._at_fault(audits)
        page_shift = control.page_shift - rate * (page_missed - self._target)
        if any(self._pages_at_fault(audit) for audit in audits):
            page_shift -= TIGHTEN
        return self._bounded(shift, page_shift)

    def _at_fault(self, audits: Sequence[Audit]) -> NDArray[np.bool_]:
        """(n_layers,) whose heads that were called local lost more than the limit."""
        lost = np.array([(audit.lost * audit.local).mean(axis=1) for audit in audits])
        at_fault: NDArray[np.bool_] = lost.max(axis=0) > self._lost_limit
        return at_fault

    def _pages_at_fault(self, audit: Audit) -> bool:
        return bool(((audit.lost * ~audit.local).mean(axis=1) > self._lost_limit).any())

    def _bounded(self, shift: NDArray[np.float64], page_shift: float) -> Control:
        if self._margins is None:
            shift = np.zeros_like(shift)
        else:  # a layer without a head that moves has no room
            greatest = self._margins.max(axis=1, initial=-MARGIN, where=self._moves)
            least = self._margins.min(axis=1, initial=MARGIN, where=self._moves)
            shift = np.clip(shift, -MARGIN - greatest, MARGIN - least)
        if not self._pages:
            return Control(shift)
        strictest = PAGE_MARGIN[0] - max(self._page_margins.values())
        return Control(shift, min(max(page_shift, strictest), 0.0))

    def native(self, control: Control) -> dict[str, Any]:
        """The policy under control, as `NativeSession.set_attention` takes it."""
        settings = dict(self._native)
        if self._margins is not None:
            shift = control.shift[:, None]
            moved = threshold(np.clip(self._margins + shift, -MARGIN, MARGIN))
            moves = self._moves & (shift != 0)
            settings["thresholds"] = np.where(moves, moved, settings["thresholds"]).astype(np.float32)
        if self._pages and control.page_shift:
            margins = {name: margin + control.page_shift for name, margin in self._page_margins.items()}
            settings |= {name: _share(margin) for name, margin in margins.items()}
            if max(margins.values()) <= PAGE_MARGIN[0]:
                settings["page_bits"] = 0
        return settings


def never_local(thresholds: ArrayLike) -> NDArray[np.bool_]:
    """Which of these the controller leaves: those above 1 among others that are not. Shaped as they are."""
    above = np.asarray(thresholds) > 1
    return above & ~above.all()


def logit(share: ArrayLike, low: float, high: float) -> NDArray[np.float64]:
    """ln(x/(1−x)) of shares x, within [low, high]; of x >= 1 it is `high`."""
    x = np.asarray(share, np.float64)
    with np.errstate(divide="ignore"):
        odds = np.log(x) - np.log1p(-np.minimum(x, 1.0))
    return np.asarray(np.clip(odds, low, high))


def _share(margin: float) -> float:
    """ε of a margin ln(ε/(1−ε)), 0 from the strictest one on."""
    return float(1 / (1 + np.exp(-margin))) if margin > PAGE_MARGIN[0] else 0.0


def threshold(margin: NDArray[np.float64]) -> NDArray[np.float64]:
    """τ of margins ln(τ/(1−τ)) within ±MARGIN, whose ends call everything local and nothing."""
    inside = 1 / (1 + np.exp(-margin))
    return np.where(margin <= -MARGIN, 0.0, np.where(margin >= MARGIN, NEVER_LOCAL, inside))
