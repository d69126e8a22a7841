"""Fits what the adaptive rule can know of a model beforehand, from one dense reading of other text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pyllm.attention import NEVER_LOCAL, Adaptive
from pyllm.bulk import PAGE, bulk_from, bulk_tokens
from pyllm.calibration import MOMENTS, Calibration
from pyllm.errors import ArgumentError
from pyllm.llm import LLM
from pyllm.record import Record
from pyllm.session import Progress, Session

Ids = NDArray[np.int32]


def fit(
    llm: LLM,
    texts: Sequence[Ids],
    *,
    window: int,
    sinks: int,
    moments: str = "prompt",
    progress: Progress | None = None,
) -> Calibration:
    """Moments of the bulk keys of these texts, means and mean squares of their queries, and for every head
    b0, b1, b2 by least squares:

        M − ln N − c·q·μ  ≈  b0 + b1 s² + b2 s

    over all queries that have a bulk, with μ and s of the moments that the estimate will take: "prompt",
    those of the query's own bulk, or "calibrated", those that are fitted. Texts are read once for "prompt",
    twice for "calibrated". texts: token ids (n,). progress: called with (tokens done, in all).
    Raises ArgumentError where no text is long enough for a bulk.
    """
    if moments not in MOMENTS:
        raise ArgumentError(f"moments: expected one of {MOMENTS}, got {moments!r}")
    policy = Adaptive(NEVER_LOCAL, "head", window=window, sinks=sinks)
    readings = _Readings(llm, texts, progress, 1 + (moments == "calibrated"))
    known = readings.read(policy)
    if moments == "calibrated":
        known = readings.read(replace(policy, moments=moments, calibration=known))
    return known


class _Readings:
    """Dense readings of the same texts."""

    def __init__(self, llm: LLM, texts: Sequence[Ids], progress: Progress | None, n: int) -> None:
        self.llm, self.texts, self.progress = llm, texts, progress
        self.done, self.total = 0, n * sum(len(text) for text in texts)

    def read(self, policy: Adaptive) -> Calibration:
        """Fitted with the policy's moments."""
        least, keys, queries = _LeastSquares(self.llm), _KeyMoments(self.llm), _QueryMoments(self.llm)
        for text in self.texts:
            session = self.llm.session(n_ctx=len(text), attention=policy)
            for first in range(0, len(text), self.llm.n_batch):
                batch = text[first : first + self.llm.n_batch]
                record = session.new_record(len(batch), audit=True, queries=True)
                session.eval(batch, record=record)
                least.add(record, _bulk_sizes(first, len(batch), policy))
                queries.add(record)
                self.done += len(batch)
                if self.progress:
                    self.progress(self.done, self.total)
            keys.add(session, _bulk_sizes(len(text) - 1, 1, policy)[0] // PAGE)
        if not keys.n:
            raise ArgumentError(
                f"fit: no text is long enough: with a window of {policy.window} and {policy.sinks} sinks a "
                f"query has a bulk only from {bulk_from(policy.window, policy.sinks)} tokens on"
            )
        positions = policy.sinks, policy.sinks + keys.longest
        fitted = least.solve(), keys.mean, keys.covariance, keys.inside, *queries.means()
        return Calibration(*fitted, positions, policy.moments, self.llm.fingerprint)


class _LeastSquares:
    """Of every head at once: (n_layers, n_heads, 3, 3) and (n_layers, n_heads, 3) normal equations."""

    def __init__(self, llm: LLM) -> None:
        shape = llm.info.n_layers, llm.info.n_heads
        self.gram, self.target = np.zeros((*shape, 3, 3)), np.zeros((*shape, 3))

    def add(self, record: Record, n_keys: NDArray[np.int64]) -> None:
        """n_keys: (n) in the bulk of each token."""
        some = n_keys > 0
        s = record.deviation[:, some].astype(np.float64).swapaxes(1, 2)  # (n_layers, n_heads, n)
        y = (record.true_mass - record.mean_score)[:, some].astype(np.float64).swapaxes(1, 2)
        x = np.stack([np.ones_like(s), s * s, s])
        self.gram += np.einsum("alhn,blhn->lhab", x, x)
        self.target += np.einsum("alhn,lhn->lha", x, y - np.log(n_keys[some]))

    def solve(self) -> NDArray[np.float64]:
        """(n_layers, n_heads, 3), the shortest solution where s hardly varies."""
        # Columns scaled to one size: s² may be a thousand times s.
        size = np.sqrt(np.diagonal(self.gram, axis1=2, axis2=3)) + 1e-30
        scaled = self.gram / (size[..., :, None] * size[..., None, :])
        inverse = np.linalg.pinv(scaled, rcond=1e-7, hermitian=True)
        solved: NDArray[np.float64] = np.einsum("lhab,lhb->lha", inverse, self.target / size) / size
        return solved


class _KeyMoments:
    """Mean, covariance and mean variance inside a page of the bulk keys of all texts."""

    def __init__(self, llm: LLM) -> None:
        self.shape = llm.info.n_layers, llm.info.n_kv_heads
        d = llm.info.head_dim
        self.n, self.longest = 0, 0
        self.mean, self.covariance = np.zeros((*self.shape, d)), np.zeros((*self.shape, d, d))
        self.inside = np.zeros((*self.shape, d))

    def add(self, session: Session, n_pages: int) -> None:
        """The first n_pages of the session's bulk; merged as in `reference.moments`, with covariances."""
        if not n_pages:
            return
        n = n_pages * PAGE
        found = [_head_moments(session, layer, head, n_pages) for layer, head in np.ndindex(*self.shape)]
        mean, cov, inside = (np.reshape(x, self.shape + x[0].shape) for x in zip(*found, strict=True))
        share, apart = n / (self.n + n), mean - self.mean
        between = share * (1 - share) * apart[..., :, None] * apart[..., None, :]
        self.covariance = (1 - share) * self.covariance + share * cov + between
        self.mean = self.mean + share * apart
        self.inside = (1 - share) * self.inside + share * inside
        self.n, self.longest = self.n + n, max(self.longest, n)


def _head_moments(
    session: Session, layer: int, kv_head: int, n_pages: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean (d), covariance (d, d) and mean variance inside a page (d) of the first n_pages."""
    found = [session.key_moments(layer, kv_head, n) for n in range(1, n_pages + 1)]
    mean, cov = (x.astype(np.float64) for x in found[-1])
    # All variance is that of the pages' means and that inside pages (the law of total variance).
    sums = np.arange(n_pages + 1)[:, None] * np.stack([np.zeros_like(mean), *(m for m, _ in found)])
    return mean, cov, np.maximum(np.diagonal(cov) - np.diff(sums, axis=0).var(axis=0), 0)


class _QueryMoments:
    """Of the queries that read each key/value head."""

    def __init__(self, llm: LLM) -> None:
        info = llm.info
        self.n = 0
        self.sum, self.squares = np.zeros((2, info.n_layers, info.n_kv_heads, info.head_dim))

    def add(self, record: Record) -> None:
        assert record.queries is not None
        n_layers, n, n_heads, d = record.queries.shape
        grouped = record.queries.reshape(n_layers, n, self.sum.shape[1], -1, d)
        self.sum += grouped.sum(axis=(1, 3), dtype=np.float64)
        self.squares += np.einsum("lngqd,lngqd->lgd", grouped, grouped)
        self.n += n * n_heads // self.sum.shape[1]

    def means(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(n_layers, n_kv_heads, head_dim) of their squares, and of themselves."""
        return self.squares / self.n, self.sum / self.n


def _bulk_sizes(position: int, n: int, policy: Adaptive) -> NDArray[np.int64]:
    """(n) keys in the bulks of the queries at position, position + 1, ..."""
    return bulk_tokens(np.arange(position, position + n) + 1, policy.window, policy.sinks)
