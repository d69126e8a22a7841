"""Counting: the words of a list that occur most often."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from pyllm.evaluate.tasks import haystack, words
from pyllm.evaluate.tasks.draft import Draft, Task

COMMON, COMMON_TIMES, RARE_TIMES = 10, 30, 3
FREQUENT = 3


def common_words(rng: random.Random, n: int) -> Draft:
    """n: how many words there are beside the common ones; made-up ones where the vocabulary ends."""
    vocabulary = rng.sample(haystack.vocabulary(), len(haystack.vocabulary()))
    made_up = itertools.filterfalse(set(vocabulary).__contains__, words.syllables(rng))
    pool = itertools.chain(vocabulary, made_up)
    common, rare = (list(itertools.islice(pool, count)) for count in (COMMON, n))
    entries = common * COMMON_TIMES + rare * RARE_TIMES
    rng.shuffle(entries)
    text = (
        "Below is a list of words. In these words, some appear more often than others. Memorize the ones "
        f"that appear most often.\n\n{', '.join(entries)}\n\n"
        f"Question: What are the {COMMON} most common words in the above list?"
    )
    opening = f"Answer: The top {COMMON} words that appear most often in the list are:\n1."
    return Draft(text, opening, tuple(common), _blind(entries, common))


def frequent_words(rng: random.Random, n: int) -> Draft:
    """n: words in all. The k-th most frequent occurs in proportion to 1/k², as the zeta distribution's."""
    whole = sum(k**-2 for k in range(1, n + 1))
    counts = [max(1, round(n / whole * k**-2)) for k in range(1, n + 1)]
    made_up = words.syllables(rng)
    entries: list[str] = []
    frequent: list[str] = []
    for count in counts:
        word = next(made_up)
        frequent.append(word)
        entries += [word] * count
        if len(entries) >= n:
            break
    rng.shuffle(entries)
    text = (
        "Read the following coded text and track the frequency of each coded word. Find the three most "
        f"frequently appeared coded words.\n\n{' '.join(entries)}\n\n"
        "Question: Do not provide any explanation. What are the three most frequently appeared words in the "
        "above coded text?"
    )
    opening = "Answer: According to the coded text above, the three most frequently appeared words are:\n1."
    answers = tuple(frequent[:FREQUENT])
    return Draft(text, opening, answers, _blind(entries, answers))


def _blind(entries: Sequence[str], answers: Sequence[str]) -> float:
    """What naming the first different words of the list scores."""
    first = list(dict.fromkeys(entries))[: len(answers)]
    return len({*first} & {*answers}) / len(answers)


TASKS = (
    Task("cwe", "the ten words of a list that occur ten times as often as others", common_words, 10, 120),
    Task("fwe", "the three most frequent of many made-up words", frequent_words, 64, 60),
)
