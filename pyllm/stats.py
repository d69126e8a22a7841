"""What a session did and what its attention read, as a snapshot; two snapshots subtract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.guard.tally import Tally


@dataclass(frozen=True)
class LayerStats:
    """Percentages, None where no query had a bulk, and for pages_read where no head was long.

    heads_local: (query, head) pairs called local. bulk_work: multiply-adds of scores and values of (query
    head, bulk key) pairs, the scores that are estimated from a sketch included. bulk_read: bulk key and value
    bytes read, per key/value head, sketch included. pages_read: of the read pages (16 tokens) in the bulks of
    (query, key/value head) pairs with a long head.
    """

    heads_local: float | None
    bulk_work: float | None
    bulk_read: float | None
    pages_read: float | None

    @classmethod
    def of(cls, counts: NDArray[np.uint64]) -> LayerStats:
        """counts (8 or more): pairs, pairs_local, work, work_done, bytes, bytes_read, pages, pages_read."""
        totals, parts = counts[:8:2], counts[1:8:2]
        return cls(
            *(
                100 * int(part) / int(total) if total else None
                for total, part in zip(totals, parts, strict=True)
            )
        )


@dataclass(frozen=True)
class Stats:
    """Counts since a session was opened, or between two moments of it (`after - before`).

    layer_counts: (n_layers, 9) as `NativeSession.layer_stats` has them. evaluated: tokens evaluated under
    each policy. Prefill is what prompts brought, decode what was evaluated token by token; seconds are
    wall-clock. guard: what its audits found, None without one.
    """

    layer_counts: NDArray[np.uint64]
    evaluated: Mapping[str, int]
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    guard: Tally | None = None

    def __sub__(self, before: Stats) -> Stats:
        spent = {policy: n - before.evaluated.get(policy, 0) for policy, n in self.evaluated.items()}
        return Stats(
            self.layer_counts - before.layer_counts,
            {policy: n for policy, n in spent.items() if n},
            self.prefill_tokens - before.prefill_tokens,
            self.prefill_seconds - before.prefill_seconds,
            self.decode_tokens - before.decode_tokens,
            self.decode_seconds - before.decode_seconds,
            self.guard - before.guard if self.guard and before.guard else self.guard,
        )

    @property
    def layers(self) -> list[LayerStats]:
        return [LayerStats.of(counts) for counts in self.layer_counts]

    @property
    def total(self) -> LayerStats:
        return LayerStats.of(self.layer_counts.sum(axis=0))

    @property
    def heads_local(self) -> float | None:
        return self.total.heads_local

    @property
    def bulk_work(self) -> float | None:
        return self.total.bulk_work

    @property
    def bulk_read(self) -> float | None:
        return self.total.bulk_read

    @property
    def pages_read(self) -> float | None:
        return self.total.pages_read

    @property
    def prefill_per_second(self) -> float | None:
        """Tokens per second."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_per_second(self) -> float | None:
        """Tokens per second."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else None

    def __str__(self) -> str:
        """One line for people: `print(session.stats)`."""
        shares = {
            "heads local": self.heads_local,
            "bulk work": self.bulk_work,
            "bulk read": self.bulk_read,
            "pages read": self.pages_read,
        }
        speeds = {
            "prefill": (self.prefill_tokens, self.prefill_per_second),
            "decode": (self.decode_tokens, self.decode_per_second),
        }
        parts = [f"{name} {'–' if share is None else f'{share:.1f} %'}" for name, share in shares.items()]
        parts += [
            f"{name} {n:,} tokens" + (f" at {per_second:,.0f} t/s" if per_second else "")
            for name, (n, per_second) in speeds.items()
        ]
        return ", ".join(parts)

    def attention(self) -> dict[str, Any]:
        """What answers carry: the four percentages of all layers, the tokens evaluated per policy, and what a
        guard found."""
        shown: dict[str, Any] = {
            "heads_local": self.heads_local,
            "bulk_work": self.bulk_work,
            "bulk_read": self.bulk_read,
            "pages_read": self.pages_read,
            "evaluated": dict(self.evaluated),
        }
        return shown | ({"guard": self.guard.summary()} if self.guard else {})
