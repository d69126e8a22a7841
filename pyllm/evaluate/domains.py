"""Where a policy is furthest from dense attention: per policy, the text with the highest KL."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyllm.evaluate.results import Row

LEGEND = "(?: its 95 % interval is not above those of all the other texts)"


@dataclass(frozen=True)
class Worst:
    """clear: its KL's 95 % interval lies above those of all the other texts."""

    policy: str
    text: str
    clear: bool


def worst(rows: Sequence[Row]) -> list[Worst]:
    """Of policies with several texts that do differ from dense attention, in the order of the rows."""
    by_policy: dict[str, list[Row]] = {}
    for row in rows:
        by_policy.setdefault(row.name, []).append(row)
    found = []
    for policy, group in by_policy.items():
        highest = max(group, key=lambda row: row.kl)
        if len(group) > 1 and highest.kl > 0:
            others = [row for row in group if row is not highest]
            found.append(Worst(policy, highest.text, all(_above(highest, other) for other in others)))
    return found


def sentences(found: Iterable[Worst]) -> list[str]:
    """A line per text that is worst for some policy."""
    policies: dict[str, list[str]] = {}
    for entry in found:
        policies.setdefault(entry.text, []).append(entry.policy + ("" if entry.clear else "?"))
    return [f"furthest from dense on {text}: {', '.join(names)}" for text, names in policies.items()]


def _above(row: Row, other: Row) -> bool:
    return row.kl_low is not None and other.kl_high is not None and row.kl_low > other.kl_high
