"""What a policy loses where an answer hangs on a few places far back: numbers hidden in prose, and asked for.

A mean over text hardly sees that. Moments of many keys do not show the one that matters, and a head that is
called local on their word never reads it: such a gate may lose little on text and most of its answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pyllm.attention import Dense, Policy
from pyllm.bulk import first_with_bulk
from pyllm.errors import ArgumentError
from pyllm.evaluate.metrics import Reference, ratio_interval
from pyllm.evaluate.tasks.draft import Task, listed
from pyllm.evaluate.tasks.needles import LEAST, needles
from pyllm.evaluate.tasks.samples import Sample, Samples
from pyllm.llm import LLM
from pyllm.session import Progress, Session

KEYS = 4  # hidden in a text, each asked for by a sample
N_TEXTS = 8
MAX_NEW = 48
SEED = 1_000_000  # not one that `pyllm eval --tasks` takes unasked


def length(window: int, sinks: int, n_ctx: int) -> int:
    """Tokens of a sample for policies with this window: as many in the bulk as not, where n_ctx has room."""
    return min(n_ctx, 2 * first_with_bulk(window, sinks))


def draw(llm: LLM, n_tokens: int, n_texts: int = N_TEXTS) -> list[Sample]:
    """Of n_tokens with their answers, those that ask about one text behind each other; none where the model's
    smallest are longer."""
    samples = Samples(llm, n_tokens, SEED)
    tasks = [Task("recall", "", needles(keys=KEYS, first=key), LEAST, MAX_NEW) for key in range(KEYS)]
    try:
        return [samples.make(task, index) for index in range(n_texts) for task in tasks]
    except ArgumentError:
        return []


def losses(
    llm: LLM, policies: Sequence[Policy], samples: Sequence[Sample], progress: Progress | None = None
) -> list[float]:
    """Of every policy the KL to dense attention in nats, the upper end of the mean's 95 % interval, over the
    tokens of the right answers, evaluated one by one behind prompts that dense attention read.

    policies: with the same window and sinks. samples: as `draw` has them, of at least two texts. progress:
    (tokens read, in all).
    """
    dense = Dense(window=policies[0].window, sinks=policies[0].sinks)
    n_ctx = max(len(sample.tokens) + sample.max_new for sample in samples)
    session = llm.session(n_ctx=n_ctx, attention=dense)
    sums, counts = np.zeros((len(policies), len(samples))), np.zeros(len(samples), np.int64)
    total = sum(len(sample.tokens) for sample in samples)
    done = 0
    for at, sample in enumerate(samples):
        answer = llm.tokenize(f" {listed(sample.answers)}.", add_special=False, parse_special=False)
        for row, kl in enumerate(_of_answer(session, dense, policies, sample.tokens, answer)):
            sums[row, at], counts[at] = kl.sum(), len(kl)
        done += len(sample.tokens)
        if progress:
            progress(done, total)
    # Those of one text share what was hidden and nearly all of the prompt: only texts are independent.
    of_texts = counts.reshape(-1, KEYS).sum(axis=1)
    return [ratio_interval(row.reshape(-1, KEYS).sum(axis=1), of_texts)[1] for row in sums]


def _of_answer(
    session: Session, dense: Dense, policies: Sequence[Policy], prompt: Sequence[int], answer: Sequence[int]
) -> Iterator[NDArray[np.float64]]:
    """Of every policy the KL of each token of the answer."""
    # The prompt's last token foretells the answer's first.
    *prompt, last = prompt
    inputs = [last, *answer[:-1]]
    session.attention = dense
    session.sync(prompt)
    reference = Reference(_one_by_one(session, inputs), np.array(answer))
    for policy in policies:
        session.rewind(len(prompt))
        session.attention = policy
        yield reference.compare(_one_by_one(session, inputs)).kl
    session.rewind(len(prompt))


def _one_by_one(session: Session, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Logits (n, n_vocab) of tokens (n) that are decoded."""
    return np.array([session.eval([token]) for token in tokens])
