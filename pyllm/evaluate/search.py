"""The cheapest policy within a budget: page shares first, then a gate in the layers where it loses least.

Nothing here runs a model: the search asks a function that measures policies, many at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.attention import GRADED, Adaptive, Dense, PageBits, Policy, page_tier
from pyllm.calibration import Calibration
from pyllm.errors import ArgumentError
from pyllm.evaluate.curves import Bands, Curve, Pages
from pyllm.evaluate.static_labels import NEVER_LOCAL
from pyllm.profile import DECODE_PART, Measured, counted

PAGE_BITS: tuple[PageBits, ...] = (GRADED, 3)  # 2 and 4 were never the cheapest
PAGE_SHARES = (0.003, 0.01, 0.03)
REFINEMENTS = 3  # times that page shares are moved towards the budget
BANDS = 10  # of neighbouring layers at most, which have a gate together or none
ATTEMPTS = 2  # at a gate, each with fewer layers
PARTS_OF_PAGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # of a budget; a gate may have the rest
NEAR = 0.9  # of a budget: what loses that much needs no refinement
TRACE = 0.12  # of what a prompt's reading loses, what decode behind it loses for that, about
OWN = DECODE_PART - TRACE  # of a budget, what decode's own choices may lose where prefill loses all of it
AIM = 0.97  # of a budget: what is predicted to lie on it would be over it every other time
MISSED = 0.9  # of an aim, the next one from the second miss on: the trace is only about known
NEGLIGIBLE = 1e-6  # nats; what float noise may lose

# Policies in, what each loses and costs out, in the same order.
Measure = Callable[[Sequence[Policy]], Sequence[Measured]]


@dataclass(frozen=True)
class Trial:
    """A policy that was measured."""

    policy: Policy
    measured: Measured

    @property
    def loss(self) -> float:
        return max(self.measured.loss, NEGLIGIBLE)

    @property
    def counts(self) -> tuple[float, float]:
        """What prefill and decode count towards a budget, each alone."""
        return counted(self.measured.kl_high, 0), counted(0, self.measured.decode_kl_high)

    @property
    def losses(self) -> tuple[float, float]:
        """Of prefill, and of decode by its own choices, each as a budget counts it."""
        prefill, decode = self.measured.kl_high, self.measured.decode_kl_high
        return max(prefill, NEGLIGIBLE), max((decode - TRACE * prefill) / OWN, NEGLIGIBLE)

    @property
    def cost(self) -> float:
        return self.measured.cost


@dataclass
class Search:
    """measure: on the tuning text. measure_band: the same, perhaps on less of it, for a gate in one band of
    layers at a time. gates: head tiers that may stand before the page tier, with one threshold for all heads.
    geometry: `window` and `sinks` of all policies. calibration: of a graded sketch."""

    measure: Measure
    measure_band: Measure
    n_layers: int
    gates: Sequence[Adaptive]
    geometry: Mapping[str, Any]
    calibration: Calibration
    trials: list[Trial] = field(default_factory=list)

    def run(self, budgets: Mapping[str, float]) -> dict[str, Trial]:
        """For every budget in nats the cheapest policy found whose loss is within it.

        Raises ArgumentError, with the best that was reached, for budgets that no policy keeps; it tells what
        keeps the others.
        """
        shares = [(share, DECODE_PART * share) for share in PAGE_SHARES]
        pages = [self._pages(bits, pair) for bits in PAGE_BITS for pair in shares]
        self._try([*pages, *self.gates])
        self._refine(list(budgets.values()))
        self._try_gates(list(budgets.values()))
        found = {name: self._within(budget) for name, budget in budgets.items()}
        met = {name: trial for name, trial in found.items() if trial}
        if len(met) < len(budgets):
            raise ArgumentError(self._unmet(budgets, met))
        return met

    def _try(self, policies: Sequence[Policy]) -> list[Trial]:
        """Measures what was not measured yet; returns those of `policies` that are new."""
        known = {trial.policy for trial in self.trials}
        new = [policy for policy in dict.fromkeys(policies) if policy not in known]
        found = [Trial(*pair) for pair in zip(new, self.measure(new) if new else (), strict=True)]
        self.trials += found
        return found

    def _within(self, budget: float) -> Trial | None:
        within = (trial for trial in self.trials if trial.loss <= budget)
        return min(within, key=lambda trial: trial.cost, default=None)

    def _unmet(self, budgets: Mapping[str, float], met: Mapping[str, Trial]) -> str:
        unmet = [
            f"the {name} budget of {budget:g} nats" for name, budget in budgets.items() if name not in met
        ]
        reached = min(self.trials, key=lambda trial: trial.loss)
        others = "".join(f"; {trial.policy} would be {name}" for name, trial in met.items())
        return (
            f"{' and '.join(unmet)} cannot be met: the best is {reached.policy} with up to "
            f"{reached.loss:.2g} nats at {reached.cost:.0f} % of the cost of dense attention{others}"
        )

    # ---- pages ----

    def _curves(self) -> list[Pages]:
        """Of the page tier without a gate, one per number of bits."""
        found = []
        for bits in PAGE_BITS:
            of_bits = [(policy, t.losses, t.measured) for policy, t in self._alone(bits)]
            prefill = {p.page_share: (losses[0], m.bulk_work) for p, losses, m in of_bits}
            decode = {p.decode_share: (losses[1], m.bulk_read) for p, losses, m in of_bits if p.decode_share}
            found.append(Pages(bits, Curve.of(prefill), Curve.of(decode)))
        return found

    def _alone(self, bits: PageBits) -> list[tuple[Dense, Trial]]:
        """What was measured of the page tier without a gate."""
        trials = [(t.policy, t) for t in self.trials if isinstance(t.policy, Dense)]
        return [(policy, trial) for policy, trial in trials if policy.page_bits == bits]

    def _is_near(self, budget: float) -> bool:
        """Whether some pages lose nearly the budget already, in prefill and in decode."""
        pages = [trial for trial in self.trials if isinstance(trial.policy, Dense)]
        return any(NEAR * budget <= min(trial.counts) and trial.loss <= budget for trial in pages)

    def _refine(self, budgets: Sequence[float]) -> None:
        """Moves page shares towards every budget that none is near. The first miss bends the curve that is
        read; what misses again is aimed lower."""
        misses = {budget: np.zeros(2) for budget in budgets}  # of prefill and of decode
        for _ in range(REFINEMENTS):
            far = [budget for budget in budgets if not self._is_near(budget)]
            aims = {budget: AIM * budget * MISSED ** np.maximum(misses[budget] - 1, 0) for budget in far}
            plans = {budget: self._refined(budget, aims[budget]) for budget in far}
            self._try(list(plans.values()))
            tried = {trial.policy: trial for trial in self.trials}
            for budget, plan in plans.items():
                misses[budget] += np.array(tried[plan].counts) > budget

    def _refined(self, budget: float, aims: NDArray[np.float64]) -> Policy:
        """The pages that should be cheapest where prefill and decode lose these, by interpolation. A share
        that was measured to lose nearly the budget stays: only the other one moves."""
        plans = []
        for curves in self._curves():
            kept = self._kept(curves.bits, budget)
            sought = (curves.prefill.share(aims[0]), curves.decode.share(aims[1]))
            plans.append((curves, (kept[0] or sought[0], kept[1] or sought[1])))
        curves, shares = min(plans, key=lambda plan: plan[0].cost(plan[1]))
        return self._pages(curves.bits, shares)

    def _kept(self, bits: PageBits, budget: float) -> tuple[float | None, float | None]:
        """The largest share of prefill, and of decode, that lost nearly the budget and never more."""
        tried = [(policy, *trial.counts) for policy, trial in self._alone(bits)]
        prefill = [(policy.page_share, lost) for policy, lost, _ in tried]
        decode = [(policy.decode_share, lost) for policy, _, lost in tried if policy.decode_share]
        return _largest_near(prefill, budget), _largest_near(decode, budget)

    def _pages(self, bits: PageBits, shares: tuple[float, float]) -> Dense:
        return Dense(**self._tier(bits, shares), **self.geometry)

    def _tier(self, bits: PageBits, shares: tuple[float, float]) -> dict[str, Any]:
        """shares: of prefill and of decode."""
        return page_tier(bits, shares[0], self.calibration, decode_share=shares[1])

    # ---- gates ----

    def _try_gates(self, budgets: Sequence[float]) -> None:
        """The gate that loses least for what it saves, in those bands where it does so best."""
        useful = [t for t in self.trials if t.policy in self.gates and t.cost < 100]
        if not useful:
            return
        gate = min(useful, key=lambda t: t.loss / (100 - t.cost)).policy
        assert isinstance(gate, Adaptive)
        measured = self._measure_bands(gate)
        aims = {budget: AIM * budget for budget in budgets}
        for _ in range(ATTEMPTS):
            plans = {budget: self._gated(gate, measured, aim) for budget, aim in aims.items()}
            tried = {t.policy: t for t in self._try([plan for plan in plans.values() if plan])}
            # Losses do not quite add up: where they came to more than predicted, less is aimed at.
            aims = {
                budget: aims[budget] * 0.9 * budget / tried[plan].loss
                for budget, plan in plans.items()
                if plan in tried and tried[plan].loss > budget
            }

    def _measure_bands(self, gate: Adaptive) -> Bands:
        policies = [
            replace(gate, threshold=_thresholds(gate, self.n_layers, band)) for band in bands(self.n_layers)
        ]
        found = self.measure_band(policies)
        saved = np.array([1 - measured.cost / 100 for measured in found])
        return Bands(np.array([max(measured.kl_high / OWN, NEGLIGIBLE) for measured in found]), saved)

    def _gated(self, gate: Adaptive, measured: Bands, budget: float) -> Policy | None:
        """Pages behind the gate in some bands, as the measured curves and bands predict them; None where
        no gate at all is predicted to be cheapest."""
        plans = [
            _planned(curves, measured, part * budget, budget)
            for curves in self._curves()
            for part in PARTS_OF_PAGES
        ]
        best = min(plans, key=lambda plan: plan.cost)
        if not best.bands:
            return None
        layers = [layer for band in best.bands for layer in bands(self.n_layers)[band]]
        thresholds = _thresholds(gate, self.n_layers, layers)
        return replace(gate, threshold=thresholds, **self._tier(best.bits, best.shares))


def _largest_near(losses: Sequence[tuple[float, float]], budget: float) -> float | None:
    """losses: (share, what it counted towards a budget), a share perhaps more than once."""
    over = {share for share, lost in losses if lost > budget}
    near = {share for share, lost in losses if NEAR * budget <= lost <= budget}
    return max(near - over, default=None)


@dataclass(frozen=True)
class _Plan:
    """A gate in some bands before pages, and what they are predicted to cost together."""

    bands: list[int]
    bits: PageBits
    shares: tuple[float, float]
    cost: float


def _planned(curves: Pages, measured: Bands, of_pages: float, budget: float) -> _Plan:
    """of_pages: nats that pages may lose in decode at least, where bands have the rest of the budget. Pages
    have what these leave; in prefill, where a gate loses as much but the budget is larger, that is more."""
    chosen, saved = measured.chosen(budget - of_pages)
    lost = float(measured.loss[chosen].sum())
    shares = (curves.prefill.share(budget - OWN * lost), curves.decode.share(budget - lost))
    return _Plan(chosen, curves.bits, shares, (1 - saved) * curves.cost(shares))


def bands(n_layers: int) -> list[list[int]]:
    """The layers of each."""
    return [band.tolist() for band in np.array_split(np.arange(n_layers), BANDS) if band.size]


def most(n_gates: int, n_budgets: int) -> int:
    """How many policies a search measures at most, those of single bands apart."""
    return len(PAGE_BITS) * len(PAGE_SHARES) + n_gates + n_budgets * (REFINEMENTS + ATTEMPTS)


def _thresholds(gate: Adaptive, n_layers: int, layers: Sequence[int]) -> NDArray[np.float64]:
    """(n_layers,): the gate's where it stands."""
    values = np.full(n_layers, NEVER_LOCAL)
    values[list(layers)] = np.asarray(gate.threshold)
    return values
