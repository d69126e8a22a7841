"""Which of the evaluated policies to recommend: the cheapest within a budget of KL."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyllm.evaluate.results import Row
from pyllm.profile import counted

DENSE_COST = 100  # %
SUMS = ("tokens", "decode_tokens", "prefill_seconds", "dense_prefill_seconds")
PREFILL = ("kl", "kl_low", "kl_high", "top1", "heads_local", "bulk_work", "bulk_read", "pages_read")
DECODE = ("decode_kl", "decode_kl_low", "decode_kl_high", "decode_bulk_read", "decode_ms", "dense_decode_ms")


@dataclass(frozen=True)
class Recommendation:
    """row: the policy's, pooled over the documents it was chosen on. kept: whether it keeps to the budget;
    otherwise no policy but dense attention does, and this one came nearest."""

    row: Row
    budget: float
    kept: bool


def recommend(rows: Iterable[Row], budget: float) -> Recommendation:
    """rows: any number per policy, one at least cheaper than dense attention. budget: nats."""
    pooled = [pool(group) for group in by_policy(rows)]
    cheaper = [row for row in pooled if cost(row) < DENSE_COST]
    within = [row for row in cheaper if loss(row) <= budget]
    if within:
        return Recommendation(min(within, key=cost), budget, True)
    return Recommendation(min(cheaper, key=loss), budget, False)


def loss(row: Row) -> float:
    """Nats: what a budget bounds, the upper ends of prefill's KL and of decode's as `profile.counted` takes
    them."""
    decode = max(row.decode_kl or 0.0, row.decode_kl_high or 0.0)
    return counted(max(row.kl, row.kl_high or 0.0), decode)


def cost(row: Row) -> float:
    """% of dense attention's: the mean of prefill's work and decode's bytes on the bulk."""
    work, read = row.bulk_work, row.decode_read
    assert work is not None
    assert read is not None  # evaluated texts have a bulk
    return (work + read) / 2


def by_policy(rows: Iterable[Row]) -> list[list[Row]]:
    """In the order in which the policies come."""
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.line, row.setting), []).append(row)
    return list(groups.values())


def pool(rows: Sequence[Row], name: str | None = None) -> Row:
    """One row for several texts: means weighted by their tokens, sums of seconds. The ends of the interval
    are the means of the texts' ends, which is wider than the interval of the mean."""
    values: dict[str, Any] = {field: _mean(rows, field, "tokens") for field in PREFILL}
    values |= {field: _mean(rows, field, "decode_tokens") for field in DECODE}
    values |= {field: sum(getattr(row, field) for row in rows) for field in SUMS}
    for field in ("perplexity", "dense_perplexity"):
        values[field] = math.exp(
            sum(row.tokens * math.log(getattr(row, field)) for row in rows) / values["tokens"]
        )
    return replace(
        rows[0], text=name or (rows[0].text if len(rows) == 1 else f"{len(rows)} documents"), **values
    )


def _mean(rows: Sequence[Row], field: str, weight: str) -> float | None:
    """Weighted by tokens, `weight`, of those rows that have a value."""
    found = [(getattr(row, weight), getattr(row, field)) for row in rows if getattr(row, field) is not None]
    return sum(n * value for n, value in found) / sum(n for n, _ in found) if found else None
