"""Scores of answers, as RULER's `string_match_all`."""

from __future__ import annotations

from collections.abc import Sequence


def score(text: str, answers: Sequence[str]) -> float:
    """The share of the answers that text contains, in whatever case: 0 or 1 where there is one.

    RULER's `string_match_part` for questions, whether any of several spellings is there, is the same here:
    these questions have one answer in one spelling.
    """
    found = text.casefold()
    return sum(answer.casefold() in found for answer in answers) / len(answers)
