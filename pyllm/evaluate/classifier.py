"""The adaptive rule as a classifier of heads: which long ones it finds, and how far its estimate is off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.attention import NEVER_LOCAL, Adaptive
from pyllm.evaluate.fields import checked, each
from pyllm.evaluate.texts import Text
from pyllm.llm import LLM
from pyllm.session import Progress

Masses = NDArray[np.float32]


@dataclass(frozen=True)
class Quality:
    """Of one layer, or of all together; percentages 0..100.

    recall: of the heads that are long by the oracle, those called long; None where there are none. precision:
    of the heads called long, those that are; None where none was. error, error_low, error_high: M̂ − M in
    nats, its mean and its 5 % and 95 % quantiles.
    """

    recall: float | None
    precision: float | None
    error: float
    error_low: float
    error_high: float

    @classmethod
    def of(cls, called: NDArray[np.bool_], truth: NDArray[np.bool_], error: Masses) -> Quality:
        """All three of one shape."""
        hits = int((called & truth).sum())
        low, high = np.quantile(error, (0.05, 0.95))
        return cls(
            100 * hits / int(truth.sum()) if truth.any() else None,
            100 * hits / int(called.sum()) if called.any() else None,
            float(error.mean(dtype=np.float64)),
            float(low),
            float(high),
        )


@dataclass(frozen=True)
class Classifier:
    """An estimate's record on a text, one by one head (granularity "head"): layers, and all together. line:
    the estimate's name; threshold: of the rule, and of the oracle that it is compared with."""

    text: str
    line: str
    threshold: float
    total: Quality
    layers: tuple[Quality, ...]

    @classmethod
    def read(cls, found: dict[str, Any]) -> Classifier:
        """What `dataclasses.asdict` made of one. Raises ValueError, TypeError or KeyError for others."""
        layers = tuple(each("layer", partial(checked, Quality), found["layers"]))
        return checked(cls, {**found, "total": checked(Quality, found["total"]), "layers": layers})

    @property
    def key(self) -> tuple[str, str, float]:
        return self.text, self.line, self.threshold


def classify(
    llm: LLM,
    text: Text,
    line: str,
    policy: Adaptive,
    thresholds: Sequence[float],
    progress: Progress | None = None,
) -> list[Classifier]:
    """The record of a policy's estimate under several thresholds.

    All from one reading in which every head is long: estimates and truth are those of dense attention's
    queries, of every token that has a bulk. The last token is nobody's query: it is there to be predicted.
    """
    queries = text.tokens[:-1]
    session = llm.session(n_ctx=len(queries), attention=replace(policy, threshold=NEVER_LOCAL))
    record = session.new_record(len(queries), audit=True)
    session.eval(queries, progress=progress, record=record)
    bulk = np.isfinite(record.true_mass).all(axis=(0, 2))
    local, estimate, truth = (
        mass[:, bulk] for mass in (record.local_mass, record.estimate, record.true_mass)
    )
    error = estimate - truth
    found = []
    for threshold in thresholds:
        called, long = (is_long(local, mass, threshold) for mass in (estimate, truth))
        layers = tuple(Quality.of(*layer) for layer in zip(called, long, error, strict=True))
        total = Quality.of(called, long, error)
        found.append(Classifier(text.name, line, threshold, total, layers))
    return found


def is_long(local_mass: Masses, bulk_mass: Masses, threshold: float) -> NDArray[np.bool_]:
    """The rule: not sigmoid(L − M) ≥ τ; in float32, and with its NaN, as the library decides."""
    with np.errstate(over="ignore"):
        share = 1 / (1 + np.exp(bulk_mass - local_mass))
    return np.asarray(~(share >= np.float32(threshold)))
