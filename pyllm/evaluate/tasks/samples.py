"""Samples: a task's prompt as a model's tokens, as long as it may be."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pyllm.errors import ArgumentError
from pyllm.evaluate.tasks.draft import Draft, Task
from pyllm.llm import LLM


@dataclass(frozen=True)
class Sample:
    """The index-th of a task. tokens: the prompt's, up to where the model's own part of the answer begins.
    chance: as in `Draft`."""

    task: str
    index: int
    tokens: tuple[int, ...]
    answers: tuple[str, ...]
    chance: float
    max_new: int


class Samples:
    """Made from (task, seed, index, length) by a model's tokenizer; the same every time.

    length: tokens of prompt and answer together. plain: without the model's chat template, as where it has
    none.
    """

    def __init__(self, llm: LLM, length: int, seed: int, *, plain: bool = False) -> None:
        self.llm, self.length, self.seed = llm, length, seed
        self.plain = plain or "tokenizer.chat_template" not in llm.metadata

    def make(self, task: Task, index: int) -> Sample:
        """With the most filler that fits. Raises ArgumentError where not even the least does."""
        room = self.length - task.max_new
        fits = task.least
        found = self._draw(task, index, fits)
        if len(found[1]) > room:
            raise ArgumentError(
                f"task {task.name}: a length of {self.length} tokens is too short: this model needs "
                f"{len(found[1])} for its smallest prompt and {task.max_new} for the answer"
            )
        too_much = 2 * fits
        while len((larger := self._draw(task, index, too_much))[1]) <= room:
            fits, too_much, found = too_much, 2 * too_much, larger
        while too_much - fits > 1:
            middle = (fits + too_much) // 2
            drawn = self._draw(task, index, middle)
            if len(drawn[1]) <= room:
                fits, found = middle, drawn
            else:
                too_much = middle
        draft, tokens = found
        return Sample(task.name, index, tuple(tokens), draft.answers, draft.chance, task.max_new)

    def _draw(self, task: Task, index: int, n: int) -> tuple[Draft, list[int]]:
        draft = task.draw(random.Random(f"{self.seed} {task.name} {index}"), n)
        return draft, self._tokens(draft)

    def _tokens(self, draft: Draft) -> list[int]:
        if self.plain:
            return self.llm.tokenize(f"{draft.text}\n{draft.opening}", add_special=True)
        asked = self.llm.chat_tokens([{"role": "user", "content": draft.text}])
        return asked + self.llm.tokenize(draft.opening, parse_special=False)
