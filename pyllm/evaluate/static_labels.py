"""How often the oracle calls each head local: what static labels are chosen by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pyllm.attention import NEVER_LOCAL, Dense, Oracle
from pyllm.bulk import first_with_bulk
from pyllm.evaluate.texts import Text
from pyllm.llm import LLM
from pyllm.session import Progress, Session

THRESHOLD = 0.9  # of the oracle, the method's default
STRIDE, PROBE = 512, 64  # tokens: in every stretch of the text, its last ones are asked about


def local_shares(
    llm: LLM, texts: Sequence[Text], window: int, sinks: int, progress: Progress | None = None
) -> NDArray[np.float64]:
    """(n_layers, n_heads) the share of sampled queries for which the oracle calls the head local.

    The text is read under dense attention. As sessions count heads per layer, its sampled tokens are then
    read once per head, which alone may be local. progress: called with (tokens done, in all).
    """
    n_all = sum(len(text.tokens) for text in texts)
    counts = np.zeros((2, llm.info.n_layers, llm.info.n_heads))
    done = 0
    for text in texts:
        session = llm.session(n_ctx=len(text.tokens), attention=Dense(window=window, sinks=sinks))
        for stop in [*range(STRIDE, len(text.tokens), STRIDE), len(text.tokens)]:
            counts += _stretch(llm, session, text.tokens[session.position : stop], window)
            if progress:
                progress(done + stop, n_all)
        done += len(text.tokens)
    pairs, local = counts
    if not pairs.all():
        raise ValueError("no query of the texts has a bulk")
    shares: NDArray[np.float64] = local / pairs
    return shares


def _stretch(llm: LLM, session: Session, tokens: NDArray[np.int32], window: int) -> NDArray[np.float64]:
    """(2, n_layers, n_heads): queries asked about, and those for which the head was local."""
    dense = session.attention
    session.eval(tokens)
    counts = np.zeros((2, llm.info.n_layers, llm.info.n_heads))
    n_probe = min(PROBE, len(tokens), session.position - first_with_bulk(window, session.sinks))
    if n_probe <= 0:
        return counts
    for head in range(llm.info.n_heads):
        thresholds = np.full((llm.info.n_layers, llm.info.n_heads), NEVER_LOCAL)
        thresholds[:, head] = THRESHOLD
        session.rewind(session.position - n_probe)
        session.attention = Oracle(thresholds, "head", window=window, sinks=session.sinks)
        before = session.stats
        session.eval(tokens[-n_probe:])
        counts[0, :, head] = n_probe
        counts[1, :, head] = (session.stats - before).layer_counts[:, 1]
    session.attention = dense
    session.rewind(session.position - n_probe)
    session.eval(tokens[-n_probe:])
    return counts
