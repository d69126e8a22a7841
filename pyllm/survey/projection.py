"""What a policy would read and compute for documents of given lengths, from its measured shares of the bulk.

A document of n tokens is read as a prompt and then talked about. With page = 64 (adaptive-attention terms):

    bulk(n)    = page · floor(max(0, n − window − sinks) / page)           keys in the bulk of its last token
    decode     : keys read for a token after the document                  n − bulk(n) + r · bulk(n)
    prefill    : (query, key) pairs of one head                            n (n + 1) / 2 − P(n) + w · P(n)
                 P(n) = Σ bulk(i), i = 1 … n                               the pairs in bulks

r is the policy's share of the bulk's bytes in decode (sketch included), w its share of the bulk's work in
prefill, both 1 for dense attention and 0 for a window. Keys become bytes by `ModelFile.kv_bytes`. A document
longer than the context counts as what the context holds of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pyllm.bulk import PAGE, Counts, bulk_tokens
from pyllm.survey.model_file import ModelFile
from pyllm.survey.shares import Share
from pyllm.survey.speed import Speed


@dataclass(frozen=True)
class Projection:
    """Of one policy over all documents. kv_bytes: of the KV cache for a token after a document, mean over the
    documents. kv_percent, decode_percent: of dense attention's, the latter of cache and weights together.
    work_percent: of the (query, key) pairs that dense attention computes in prefill. decode_ms: of a token,
    mean over the documents. prefill_seconds: of all documents. Both None where speed was not measured."""

    share: Share
    kv_bytes: float
    kv_percent: float
    decode_percent: float
    work_percent: float
    decode_ms: float | None = None
    prefill_seconds: float | None = None


def bulk_pairs(n: Counts, window: int, sinks: int) -> Counts:
    """Sum of bulk_tokens over 1 … n, elementwise: whole pages, each for PAGE queries, and the last few."""
    pages, rest = np.divmod(np.maximum(0, n - window - sinks), PAGE)
    found: Counts = PAGE * (PAGE * (pages * (pages - 1) // 2) + pages * (rest + 1))
    return found


def project(
    model: ModelFile,
    tokens: Counts,
    shares: Sequence[Share],
    *,
    window: int,
    sinks: int,
    n_ctx: int,
    speed: Speed | None = None,
) -> list[Projection]:
    """tokens: (n,) lengths of documents, at least one. speed: of dense attention, for times."""
    n = np.minimum(tokens, n_ctx)
    bulk, in_bulk = bulk_tokens(n, window, sinks), bulk_pairs(n, window, sinks)
    pairs = n * (n + 1) // 2
    dense_bytes, weights = model.kv_bytes * n.mean(), model.weight_bytes
    found = []
    for share in shares:
        read = model.kv_bytes * (n - bulk + share.read * bulk)
        computed = pairs - in_bulk + share.work * in_bulk
        found.append(
            Projection(
                share,
                kv_bytes=float(read.mean()),
                kv_percent=100 * float(read.mean() / dense_bytes),
                decode_percent=100 * float((read.mean() + weights) / (dense_bytes + weights)),
                work_percent=100 * float(computed.sum() / pairs.sum()),
                decode_ms=None if speed is None else 1000 * float(speed.decode_seconds(read).mean()),
                prefill_seconds=None if speed is None else float(speed.prefill_seconds(n, computed).sum()),
            )
        )
    return found
