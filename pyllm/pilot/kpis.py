"""The figures that a rollout is judged by, each with its definition."""

from __future__ import annotations

from dataclasses import dataclass

from pyllm.evaluate.results import Row
from pyllm.pilot.heads import PROMISE, Heads
from pyllm.survey.projection import Projection


@dataclass(frozen=True)
class Kpi:
    name: str
    value: str
    definition: str


def kpis(row: Row, projection: Projection, heads: Heads) -> list[Kpi]:
    """row: the recommended policy's, pooled. projection: onto the whole folder."""
    return [*_quality(row), *_savings(row, projection), *_misses(heads)]


def _quality(row: Row) -> list[Kpi]:
    bound = "" if row.kl_high is None else f" (up to {row.kl_high:.4f})"
    return [
        Kpi(
            "Quality kept: KL",
            f"{row.kl:.4f} nats{bound}",
            "Mean divergence KL(dense ‖ policy) of the next token's distribution over all tokens that have a "
            "bulk, 0 where both are the same. In brackets the mean of the documents' upper ends of 95 % "
            "intervals over blocks of 64 tokens.",
        ),
        Kpi(
            "Quality kept: top-1",
            f"{row.top1:.2f} %",
            "Tokens after which the policy's likeliest next token is also dense attention's.",
        ),
        Kpi(
            "Quality kept: perplexity",
            f"{row.perplexity:.3f} against {row.dense_perplexity:.3f}",
            "Exponential of the mean negative log-probability of the documents' own next tokens, under the "
            "policy and under dense attention.",
        ),
    ]


def _savings(row: Row, projection: Projection) -> list[Kpi]:
    found = [
        Kpi(
            "Bytes saved in decode",
            f"{100 - projection.kv_percent:.1f} % of the KV cache's, {100 - projection.decode_percent:.1f} % "
            "with weights",
            "Projected onto all documents of the folder: KV-cache bytes not read for a token after a "
            "document, from the documents' lengths and the share of the bulk that the policy read in the "
            "sample (sketches included), beside dense attention's; then the same with the weights, which "
            "every token reads.",
        ),
        Kpi(
            "Work saved in prefill",
            f"{100 - projection.work_percent:.1f} %",
            "Projected onto all documents: multiply-adds of attention not done while reading them, beside "
            "dense attention's. Negative: more, as scoring takes some.",
        ),
        Kpi(
            "Time saved in prefill",
            _saved(row.prefill_seconds, row.dense_prefill_seconds),
            "Measured on the sample on this machine: time to read the documents, logits of their tokens "
            "included, beside dense attention's. Negative: slower.",
        ),
    ]
    if row.decode_ms is not None and row.dense_decode_ms is not None:
        found.append(
            Kpi(
                "Time saved in decode",
                _saved(row.decode_ms, row.dense_decode_ms),
                "Measured on the sample on this machine: median time of a token at the end of a document, "
                "beside dense attention's. Negative: slower.",
            )
        )
    return found


def _misses(heads: Heads) -> list[Kpi]:
    return [
        Kpi(
            "Miss rate",
            f"{100 * heads.miss_rate:.3f} % of {heads.lost.size:,}",
            f"Of audited (query, head) pairs: those called local although sinks and window hold less than "
            f"{PROMISE:g} of the head's true attention. 0 for a policy that calls no head local.",
        ),
        Kpi(
            "Page miss rate",
            f"{100 * heads.page_miss_rate:.3f} % of {heads.lost.size:,}",
            f"Of the same pairs: those called long whose pages, with sinks and window, hold less than "
            f"{PROMISE:g} of the head's true attention. 0 for a policy that reads the whole bulk.",
        ),
        Kpi(
            "Lost share",
            f"{100 * heads.lost_mean:.2f} % in the mean, {100 * heads.lost_99:.2f} % at most for 99 %",
            "True share of a head's attention for a query that was not read, over the same pairs.",
        ),
    ]


def _saved(value: float, dense: float) -> str:
    return f"{100 * (1 - value / dense):.1f} %"
