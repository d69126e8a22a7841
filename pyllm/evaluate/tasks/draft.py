"""What a task is: something that draws prompts of any length and knows their answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Draft:
    """A prompt with its answers. text: what the user says: instruction, document, question. opening: how the
    answer begins, put into the model's mouth, as RULER does. chance: what a reader scores who names things of
    the right kind as they come in the document, blind to the question; 0 where the document has only the
    right ones, so that finding them is the task."""

    text: str
    opening: str
    answers: tuple[str, ...]
    chance: float = 0.0


# Random numbers and an amount of filler (sentences, words, documents) to a prompt. What is drawn does not
# depend on the amount, but for being more of the same: a longer prompt holds a shorter one's filler.
Draw = Callable[[random.Random, int], Draft]


@dataclass(frozen=True)
class Task:
    """least: the smallest amount of filler that leaves something to look for. max_new: tokens of an
    answer, at most."""

    name: str
    what: str
    draw: Draw
    least: int
    max_new: int


def listed(items: tuple[str, ...]) -> str:
    """As people write it: a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
