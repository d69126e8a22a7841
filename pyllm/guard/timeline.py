"""What the guard knows of every position, so that a rewind leads back to what was known there.

Decisions depend on tokens, seed and settings alone: control changes at multiples of the control period only,
from the audits of the period before; and a repair makes everything dense from the last clean audit to the end
of the period in which the failed one lies, whether that was found one token later or at the end of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from pyllm.guard.audit import Audit
from pyllm.guard.controller import Control

Step = Callable[[Control, Sequence[Audit]], Control]


@dataclass(frozen=True)
class Stretch:
    """Positions [first, stop) that a repair made dense, because of the audit at position `cause`."""

    first: int
    stop: int
    cause: int


@dataclass
class Timeline:
    """period: of the control. floor: position from which the guard watches. first_lossy: the first one where
    something can be lost. start: control at the floor. lost_limit: of a clean audit."""

    period: int
    floor: int
    first_lossy: int
    start: Control
    lost_limit: float
    audits: list[Audit] = field(default_factory=list)
    _controls: list[tuple[int, Control]] = field(default_factory=list)  # (position from which it holds, it)
    _stretches: list[Stretch] = field(default_factory=list)

    @property
    def control(self) -> Control:
        return self._controls[-1][1] if self._controls else self.start

    @property
    def clean(self) -> int:
        """Positions before it are verified: by a clean audit, or because a repair made (or will make) them
        dense, or because there was nothing to lose."""
        audited = next((a.position + 1 for a in reversed(self.audits) if self.is_clean(a)), 0)
        return max(self.floor, self.first_lossy, audited, self._dense_until)

    @property
    def stretch(self) -> Stretch | None:
        """What the latest repair that still stands made dense."""
        return self._stretches[-1] if self._stretches else None

    @property
    def _dense_until(self) -> int:
        return self._stretches[-1].stop if self._stretches else 0

    def is_clean(self, audit: Audit) -> bool:
        return audit.worst <= self.lost_limit

    def is_dense(self, position: int) -> bool:
        """Whether a repair makes this position, the next to be evaluated, dense."""
        return position < self._dense_until

    def boundary(self, position: int) -> int:
        """The end of the control period that `position` lies in."""
        return (position // self.period + 1) * self.period

    def advance(self, position: int, step: Step) -> None:
        """Before the token at `position` is evaluated: where a control period begins, control moves."""
        known = self._controls[-1][0] if self._controls else self.floor
        if position % self.period or position <= known:
            return
        evidence = [a for a in self._since(position - self.period) if a.sampled]
        if evidence:
            self._controls.append((position, step(self.control, evidence)))

    def _since(self, position: int) -> list[Audit]:
        n = len(self.audits)
        while n and self.audits[n - 1].position >= position:
            n -= 1
        return self.audits[n:]

    def repair(self, cause: int) -> Stretch:
        """Makes everything dense from the last clean audit to the end of the control period."""
        stretch = Stretch(self.clean, self.boundary(cause), cause)
        self._stretches.append(stretch)
        return stretch

    def pin(self) -> Stretch:
        """The latest stretch, which from now on stays although what lies behind its first token changes."""
        stretch = self._stretches[-1]
        self._stretches[-1] = replace(stretch, cause=stretch.first - 1)
        return stretch

    def rewind(self, n: int) -> int:
        """Forgets what was found at positions from n on.

        Returns how many tokens stand as they would in a new session, at most n: where the cause of a dense
        stretch is forgotten, what it made dense before n must be evaluated again.
        """
        kept = min([n, *(s.first for s in self._stretches if s.cause >= n)])
        self._stretches = [s for s in self._stretches if s.cause < n]
        self.audits = [a for a in self.audits if a.position < kept]
        self._controls = [(at, control) for at, control in self._controls if at <= kept]
        self.floor = min(self.floor, kept)
        return kept
