"""Answers of which only what the guard has verified is shown; what it repairs is drawn again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.errors import ArgumentError
from pyllm.generation import Generation, Piece
from pyllm.guard.watch import Watch
from pyllm.session import Progress


class VerifiedGeneration(Generation):
    """Pieces come in bursts, when an audit confirms them; the last token is audited in any case.

    Where an audit fails, the tokens drawn since the last clean one are drawn again from what the repair left,
    which is dense up to the end of its control period. Raises ArgumentError where the session has no guard
    that repairs.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._n_shown = 0
        self._held: list[Piece] = []  # the pieces behind the first n_shown
        self._watch()

    def _watch(self) -> Watch:
        watch = self.session.watch
        if not watch or not watch.guard.repair:
            raise ArgumentError("hold_back: only a session with a guard that repairs verifies its answers")
        return watch

    def pieces(self, progress: Progress | None = None) -> Iterator[Piece]:
        logits: NDArray[np.float32] | None = self._begin(progress)
        while logits is not None:
            piece = self._draw(logits)
            self._held.append(piece)
            n_repairs = self._watch().tally.repairs
            if piece.finish_reason:
                self._verify()
            logits = None if piece.finish_reason else self._next()
            if self._watch().tally.repairs > n_repairs:
                logits = self._draw_again()
            yield from self._confirmed()

    def _verify(self) -> None:
        """The answer has ended: has its last token audited."""
        with self.session.lock:
            self._require_untouched()
            self.session.verify()
            self._revision = self.session.revision
            self._ended = self.session.stats

    def _draw_again(self) -> NDArray[np.float32]:
        """Drops what was drawn from logits that no longer stand; the logits to go on from."""
        with self.session.lock:
            self._require_untouched()
            position = max(self._watch().pin_repair(), self.n_prompt - 1)
            token = self.session.tokens[position]
            self.session.rewind(position)
            logits = self.session.eval([token])
            self._revision = self.session.revision
        kept = position + 1 - self.n_prompt
        self.draft.take_back(kept)
        self._ended = None
        del self._held[kept - self._n_shown :]
        return logits

    def _confirmed(self) -> list[Piece]:
        """What can be shown by now. The i-th piece was drawn from the logits after n_prompt + i tokens."""
        n = min(max(0, self._watch().verified - self.n_prompt + 1 - self._n_shown), len(self._held))
        ready, self._held = self._held[:n], self._held[n:]
        self._n_shown += n
        return ready
