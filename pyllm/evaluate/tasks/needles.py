"""Needle retrieval: numbers under made-up keys, hidden in prose, and a question about some of them."""

from __future__ import annotations

import random

from pyllm.evaluate.tasks import words
from pyllm.evaluate.tasks.draft import Draft, Draw, Task, listed
from pyllm.evaluate.tasks.haystack import hide

LEAST = 8  # sentences


def needles(*, keys: int = 1, values: int = 1, asked: int = 1, first: int = 0) -> Draw:
    """keys: how many are hidden, each with so many values. asked: about how many of the keys, from `first`
    on."""

    def draw(rng: random.Random, n: int) -> Draft:
        names = words.keys(rng, keys)
        numbers = [str(number) for number in rng.sample(range(10**6, 10**7), keys * values)]
        hidden = [(names[i // values], number) for i, number in enumerate(numbers)]
        wanted = names[first : first + asked]
        answers = tuple(number for name, number in hidden if name in wanted)
        rng.shuffle(hidden)
        lines = [f"One of the special magic numbers for {name} is: {number}." for name, number in hidden]
        of = listed(wanted)
        what, are = ("number", "is") if len(answers) == 1 else ("numbers", "are")
        text = (
            "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
            f"I will quiz you about the numbers afterwards.\n\n{hide(rng, lines, n)}\n\n"
            f"What {are} {'' if len(answers) == 1 else 'all '}the special magic {what} for {of} mentioned in "
            "the provided text?"
        )
        opening = f"The special magic {what} for {of} mentioned in the provided text {are}"
        return Draft(text, opening, answers, chance=0.0 if asked == keys else asked / keys)

    return draw


TASKS = (
    Task("niah_single", "one number in prose", needles(), LEAST, 48),
    Task("niah_multikey", "the number of one key among four", needles(keys=4), LEAST, 48),
    Task("niah_multivalue", "all four numbers of one key", needles(values=4), LEAST, 128),
    Task("niah_multiquery", "the numbers of all four keys", needles(keys=4, asked=4), LEAST, 128),
)
