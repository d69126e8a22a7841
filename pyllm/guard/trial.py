"""A trial of the controller: the audited miss rate over a long text, from any first threshold or page
share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pyllm.attention import Adaptive, Policy
from pyllm.evaluate.metrics import ratio_interval
from pyllm.guard.bounds import wilson
from pyllm.guard.controller import Control, never_local
from pyllm.guard.settings import Guard
from pyllm.guard.tally import Tally
from pyllm.llm import LLM
from pyllm.stats import Stats

PIECE = 512  # tokens evaluated at once
STRETCH = 1500  # tokens of one text before the next one follows


@dataclass(frozen=True)
class Course:
    """From one first threshold or, of a policy without thresholds, page share. pieces: what happened in every
    PIECE tokens, in order. thresholds: (n_layers,) at the end, or page_share; the other is None.
    """

    start: float
    pieces: Sequence[Stats]
    thresholds: NDArray[np.float32] | None
    page_share: float | None = None

    def missed(self, found: Tally) -> NDArray[np.int64]:
        """(n_layers, n_heads) of what was moved: heads called local, or the pages of long ones."""
        return found.page_missed if self.thresholds is None else found.missed

    def miss_rate(self, found: Tally) -> float | None:
        """Likewise."""
        return found.page_miss_rate if self.thresholds is None else found.miss_rate

    def half(self, second: bool) -> Tally:
        """What audits found in the first or the second half of the tokens."""
        middle = len(self.pieces) // 2
        found = [piece.guard for piece in (self.pieces[middle:] if second else self.pieces[:middle])]
        return sum_of([tally for tally in found if tally])

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the second half's miss rate. None for fewer than two pieces with
        audits."""
        found = [piece.guard for piece in self.pieces[len(self.pieces) // 2 :] if piece.guard]
        return rate_interval([(self.missed(tally), tally.audits) for tally in found if tally.audits])

    @property
    def late(self) -> Stats:
        """Of the second half, what attention did."""
        counts = [piece.layer_counts for piece in self.pieces[len(self.pieces) // 2 :]]
        return replace(self.pieces[-1], layer_counts=np.sum(counts, axis=0))


def sum_of(tallies: Sequence[Tally]) -> Tally:
    total = tallies[0]
    for tally in tallies[1:]:
        total = total + tally
    return total


def rate_interval(pieces: Sequence[tuple[NDArray[np.int64], int]]) -> tuple[float, float] | None:
    """95 % confidence interval of the miss rate of pieces of text, None for fewer than two.

    pieces: of each, how often each head (n_layers, n_heads) missed, and of how many audits, at least one.

    Heads of one token err together and neighbouring tokens resemble each other, so that pieces are what
    counts as independent. Where nothing was missed, the upper end is Wilson's with every audit as one draw.
    """
    if len(pieces) < 2:
        return None
    missed = np.array([of_piece.mean() for of_piece, _ in pieces])
    audits = np.array([n for _, n in pieces])
    if not missed.any():
        return 0.0, float(wilson(0, audits.sum())[1])
    low, high = ratio_interval(missed, audits)
    return low, min(1.0, high)


def mixed(texts: Sequence[NDArray[np.int32]], n_tokens: int) -> NDArray[np.int32]:
    """At most n_tokens ids (n,) of all texts in turn, STRETCH of one after STRETCH of the other."""
    longest = max(map(len, texts))
    parts = [text[at : at + STRETCH] for at in range(0, longest, STRETCH) for text in texts]
    return np.concatenate(parts)[:n_tokens]


def starting(policy: Policy, start: float) -> Policy:
    """With this first threshold for all heads but those that never are local, as `never_local` has it; a
    policy without thresholds, which has a page tier, with this page share.

    Beside heads that never are local a start above 1 is 1: nothing is local then either, but may become so.
    Raises ArgumentError for a start that is no threshold, or no share.
    """
    if not isinstance(policy, Adaptive):
        return replace(policy, page_share=start)  # type: ignore[call-arg]
    thresholds = np.asarray(policy.threshold)
    never = never_local(thresholds)
    if not never.any():
        return replace(policy, threshold=start)
    return replace(policy, threshold=np.where(never, thresholds, min(start, 1.0)))


def run(
    llm: LLM,
    tokens: NDArray[np.int32],
    policy: Policy,
    start: float,
    guard: Guard,
    n_ctx: int,
    on_tokens: Callable[[int], None],
) -> Course:
    """Evaluates tokens, cut into equal documents that fit n_ctx; control is handed on from one to the next.

    policy: with thresholds or a page tier. start: as `starting` takes it. on_tokens: called with the number
    of tokens after every piece.
    """
    session = llm.session(n_ctx=n_ctx, attention=starting(policy, start))
    pieces: list[Stats] = []
    control: Control | None = None
    for document in np.array_split(tokens, -(-len(tokens) // n_ctx)):
        session.rewind(0)
        session.guard = replace(guard, start=control)
        for at in range(0, len(document), PIECE):
            before = session.stats
            session.eval(document[at : at + PIECE])
            pieces.append(session.stats - before)
            on_tokens(len(document[at : at + PIECE]))
        assert session.watch
        watch, control = session.watch, session.watch.control
    if isinstance(policy, Adaptive):
        return Course(start, pieces, watch.thresholds()[:, 0])
    return Course(start, pieces, None, watch.page_share)
