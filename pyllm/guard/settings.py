"""What a guard is asked to do, as a value."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

import numpy as np

from pyllm.bulk import PAGE
from pyllm.errors import ArgumentError
from pyllm.guard.controller import Control


@dataclass(frozen=True)
class Guard:
    """Watches what attention leaves out: audits, controls, repairs, logs. docs/guard.md says how.

    audit_rate: part of the tokens that are audited, rounded to one in a whole number, up to 1. promise: τ*,
    the share of its attention that every head should read. miss_target: α, the part of the audited (query,
    head) pairs that may break it; thresholds follow. lost_limit: share a layer may lose, as the mean of its
    heads, before a repair; 1 is never. repair: go back to the last clean audit and evaluate again, densely.
    control_period: tokens between two changes of thresholds, a multiple of 64. log: file for the decision
    log; log_masses: with the masses behind every decision; log_bytes: at most, all in all. seed: of what is
    audited. start: control that another session's guard arrived at.
    """

    audit_rate: float = 1 / 64
    promise: float = 0.9
    miss_target: float = 0.02
    lost_limit: float = 0.5
    repair: bool = True
    control_period: int = 256
    log: str | PathLike[str] | None = None
    log_masses: bool = False
    log_bytes: int = 64 * 2**20
    seed: int = 0
    start: Control | None = None

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, np.generic):  # which the log could not write
                object.__setattr__(self, setting.name, value.item())
        _require("audit_rate", self.audit_rate, 1e-6, 1)
        _require("promise", self.promise, 0.001, 0.999)
        _require("miss_target", self.miss_target, 1e-4, 0.5)
        _require("lost_limit", self.lost_limit, 0, 1)
        _require_whole("log_bytes", self.log_bytes, 2**16)
        _require_whole("seed", self.seed, -(2**63))
        _require_whole("control_period", self.control_period, 1)
        if self.control_period % PAGE:
            raise ArgumentError(f"control_period: expected a multiple of {PAGE}, got {self.control_period}")

    @property
    def interval(self) -> int:
        """Positions of which one is audited."""
        return round(1 / self.audit_rate)


def _require(name: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise ArgumentError(f"{name}: expected a number from {low:g} to {high:g}, got {value!r}")


def _require_whole(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ArgumentError(f"{name}: expected a whole number from {low} up, got {value!r}")
