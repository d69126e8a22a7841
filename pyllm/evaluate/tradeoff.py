"""A text under several policies at once, side by side with dense attention."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pyllm.attention import Dense, Policy
from pyllm.bulk import bulk_from, first_with_bulk
from pyllm.device import available_on
from pyllm.errors import ArgumentError
from pyllm.evaluate.candidates import Candidate
from pyllm.evaluate.metrics import Reference, Scores, blocks_interval, perplexity
from pyllm.evaluate.results import Row
from pyllm.evaluate.texts import Text
from pyllm.llm import LLM
from pyllm.session import Session
from pyllm.stats import Stats

MOST_AT_ONCE = 8  # policies beside one dense session: more save little


def least(window: int, sinks: int, n_decode: int) -> int:
    """Tokens of the shortest text of which a query of the prefill has a bulk, and the last is predicted."""
    return bulk_from(window, sinks) + n_decode + 1


def require_bulk(text: Text, window: int, sinks: int, n_decode: int) -> None:
    """Raises ArgumentError where no query of the prefill would have a bulk to read or leave."""
    needed = least(window, sinks, n_decode)
    if len(text.tokens) < needed:
        raise ArgumentError(
            f"text {text.name!r}: {len(text.tokens)} tokens, but with a window of {window}, {sinks} sinks "
            f"and {n_decode} decoded tokens a query has a bulk only from {needed} tokens on: take a "
            f"longer text, more --ctx or a smaller --window"
        )


def at_once(llm: LLM, n_ctx: int) -> int:
    """How many policies to evaluate side by side: their sessions may take half of the available memory."""
    available = available_on(llm.device)
    if available is None:
        return MOST_AT_ONCE
    return max(1, min(MOST_AT_ONCE, available // 2 // llm.session_memory(n_ctx) - 1))


def evaluate(
    llm: LLM,
    text: Text,
    candidates: Sequence[Candidate],
    *,
    n_decode: int,
    on_tokens: Callable[[int], None] | None = None,
) -> list[Row]:
    """A row per candidate, whose window and sinks are all the same; as `side_by_side`."""
    policies = [candidate.policy for candidate in candidates]
    dense, runs = side_by_side(llm, text, policies, n_decode=n_decode, on_tokens=on_tokens)
    return [_row(text, candidate, run, dense) for candidate, run in zip(candidates, runs, strict=True)]


def side_by_side(
    llm: LLM,
    text: Text,
    policies: Sequence[Policy],
    *,
    n_decode: int,
    on_tokens: Callable[[int], None] | None = None,
) -> tuple[Run, list[Run]]:
    """Dense attention over halves with activations of 16 bits, and each policy, whose window and sinks are
    all the same, with the model's KV cache and activations, on a text.

    Every token but the last, which is only foretold, is evaluated under each policy, the last n_decode of
    them one by one. Those that have a bulk count for quality. on_tokens: called with how many tokens were
    evaluated since.
    """
    window, sinks = policies[0].window, policies[0].sinks
    require_bulk(text, window, sinks, n_decode)
    inputs, targets = text.tokens[:-1], text.tokens[1:]
    whole = Dense(window=window, sinks=sinks)
    dense = Run(llm.session(n_ctx=len(inputs), attention=whole, kv_type="f16", activation_bits=16))
    runs = [Run(llm.session(n_ctx=len(inputs), attention=policy)) for policy in policies]
    n_prefill = len(inputs) - n_decode
    for first, stop in _steps(n_prefill, len(inputs), llm.n_batch):
        decode = first >= n_prefill
        # Logits are worth their time only where a query has a bulk.
        skipped = min(max(first, first_with_bulk(window, sinks)), stop) - first
        logits = dense.eval(inputs[first:stop], skipped, decode)
        reference = Reference(logits, targets[first + skipped : stop])
        for run in runs:
            run.scores[decode].append(reference.compare(run.eval(inputs[first:stop], skipped, decode)))
        if on_tokens:
            on_tokens((stop - first) * (1 + len(runs)))
    return dense, runs


@dataclass
class Run:
    """One session on its way through the text; [0] is prefill, [1] decode."""

    session: Session
    scores: tuple[list[Scores], list[Scores]] = field(default_factory=lambda: ([], []))
    seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    prefilled: Stats | None = None

    def eval(self, tokens: NDArray[np.int32], skipped: int, decode: bool) -> NDArray[np.float32]:
        """Logits (len(tokens) - skipped, n_vocab) of the last tokens."""
        if decode and self.prefilled is None:
            self.prefilled = self.session.stats
        began = time.perf_counter()
        wanted = skipped < len(tokens)
        logits = self.session.eval(tokens, all_logits=wanted)
        self.seconds[decode].append(time.perf_counter() - began)
        return logits[skipped:] if wanted else logits[:0, None]

    @property
    def prefill(self) -> Stats:
        return self.prefilled or self.session.stats

    @property
    def decode(self) -> Stats:
        return self.session.stats - self.prefill

    @property
    def prefill_seconds(self) -> float:
        return sum(self.seconds[0])

    @property
    def decode_milliseconds(self) -> float | None:
        """Median of a token."""
        return 1000 * statistics.median(self.seconds[1]) if self.seconds[1] else None


def _steps(n_prefill: int, n: int, n_batch: int) -> Iterator[tuple[int, int]]:
    """(first, stop) of what is evaluated at once: batches, then single tokens."""
    for first in range(0, n_prefill, n_batch):
        yield first, min(first + n_batch, n_prefill)
    for first in range(n_prefill, n):
        yield first, first + 1


def _row(text: Text, candidate: Candidate, run: Run, dense: Run) -> Row:
    scores, decoded = (Scores.joined(parts) for parts in run.scores)
    interval, decode_interval = blocks_interval(scores.kl), blocks_interval(decoded.kl)
    return Row(
        text=text.name,
        line=candidate.line,
        setting=candidate.setting,
        tokens=len(scores),
        kl=float(scores.kl.mean()),
        kl_low=interval[0] if interval else None,
        kl_high=interval[1] if interval else None,
        top1=100 * float(scores.agrees.mean()),
        perplexity=perplexity(scores.nll),
        dense_perplexity=perplexity(scores.dense_nll),
        heads_local=run.prefill.heads_local,
        bulk_work=run.prefill.bulk_work,
        bulk_read=run.prefill.bulk_read,
        prefill_seconds=run.prefill_seconds,
        dense_prefill_seconds=dense.prefill_seconds,
        decode_tokens=len(decoded),
        decode_kl=float(decoded.kl.mean()) if len(decoded) else None,
        decode_bulk_read=run.decode.bulk_read if len(decoded) else None,
        decode_ms=run.decode_milliseconds,
        dense_decode_ms=dense.decode_milliseconds,
        pages_read=run.prefill.total.pages_read,
        decode_kl_low=decode_interval[0] if decode_interval else None,
        decode_kl_high=decode_interval[1] if decode_interval else None,
    )
