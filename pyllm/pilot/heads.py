"""What each head needs, and what a policy gives it: shares of attention from a sample of audited queries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.attention import Policy
from pyllm.bulk import first_with_bulk
from pyllm.evaluate.texts import Text
from pyllm.guard.audit import audits
from pyllm.llm import LLM
from pyllm.record import Masses, Record
from pyllm.session import Progress

PROMISE = 0.9  # τ*: the share that what a head reads should hold at least
AUDITED = 256  # queries of a text, about

Shares = NDArray[np.float32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Heads:
    """Of audited queries that have a bulk, (n_queries, n_layers, n_heads) each. local_mass, true_mass:
    L and M as in `Record`. The others as the guard's audits have them."""

    local_mass: Masses
    true_mass: Masses
    local: Flags
    missed: Flags
    page_missed: Flags
    lost: Shares

    def __len__(self) -> int:
        return len(self.local_mass)

    @property
    def whole_mass(self) -> Masses:
        """Logarithm of the summed exponentials of all scores."""
        mass: Masses = np.logaddexp(self.local_mass, self.true_mass)
        return mass

    @property
    def local_share(self) -> Shares:
        """The true share of sinks and window, sigmoid(L − M)."""
        share: Shares = np.exp(self.local_mass - self.whole_mass)
        return share

    @property
    def truly_long(self) -> NDArray[np.float64]:
        """(n_layers, n_heads) part of the queries whose window holds less than the promise."""
        rates: NDArray[np.float64] = (self.local_share < PROMISE).mean(axis=0)
        return rates

    @property
    def called_long(self) -> NDArray[np.float64]:
        """(n_layers, n_heads) part of the queries for which the policy reads something of the bulk."""
        rates: NDArray[np.float64] = (~self.local).mean(axis=0)
        return rates

    @property
    def miss_rate(self) -> float:
        """Of all (query, head) pairs those called local although their window holds less than the promise."""
        return float(self.missed.mean())

    @property
    def page_miss_rate(self) -> float:
        """Of all pairs those that are long, but what they read holds less than the promise."""
        return float(self.page_missed.mean())

    @property
    def lost_mean(self) -> float:
        return float(self.lost.mean(dtype=np.float64))

    @property
    def lost_99(self) -> float:
        """The share that 99 % of the pairs do not exceed."""
        return float(np.quantile(self.lost, 0.99))


def observe(llm: LLM, texts: Sequence[Text], policy: Policy, seed: int, progress: Progress) -> Heads:
    """Reads the texts under the policy; seed draws the audited queries. progress: (tokens done, in all)."""
    total = sum(len(text.tokens) for text in texts)
    done = 0
    parts = []
    for text in texts:
        for record in _records(llm, text, policy, seed):
            parts.append(_audited(record))
            done += len(record)
            progress(done, total)
    return Heads(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _records(llm: LLM, text: Text, policy: Policy, seed: int) -> Iterable[Record]:
    """Batch by batch: a record of a whole text could be larger than the model."""
    n = len(text.tokens)
    audit = np.random.default_rng(seed).random(n) < AUDITED / n
    audit[: first_with_bulk(policy.window, policy.sinks)] = False
    audit[-1] = True  # at least one
    session = llm.session(n_ctx=n, attention=policy)
    for first in range(0, n, llm.n_batch):
        tokens = text.tokens[first : first + llm.n_batch]
        record = session.new_record(len(tokens), audit[first : first + len(tokens)])
        session.eval(tokens, record=record)
        yield record


def _audited(record: Record) -> tuple[NDArray[Any], ...]:
    """The arrays of `Heads`."""
    found = audits(record, 0, PROMISE)
    n_layers, _, n_heads = record.is_long.shape

    def stacked(name: str) -> NDArray[Any]:
        return np.array([getattr(audit, name) for audit in found]).reshape(-1, n_layers, n_heads)

    local, missed, page_missed = (stacked(name).astype(bool) for name in ("local", "missed", "page_missed"))
    of_audited = (np.swapaxes(mass[:, record.audit], 0, 1) for mass in (record.local_mass, record.true_mass))
    return *of_audited, local, missed, page_missed, stacked("lost")
