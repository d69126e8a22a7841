"""Prose to hide things in: sentences of Python's language reference, which every Python carries."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from functools import cache
from importlib import import_module

# No digits and no capitals inside: what is hidden has them, and has to be the only thing that does.
PLAIN = re.compile(r"[A-Z][a-z ,;:'()/-]+\.")
WORDS = range(6, 41)  # in a sentence


@cache
def sentences() -> tuple[str, ...]:
    """Of the half of the topics that nothing is fitted on (`texts.builtin`): each once, in their order."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    found = []
    for name in sorted(topics)[::2]:
        for paragraph in re.split(r"\n\s*\n", re.sub(r"[*`\"]", "", topics[name])):
            found += re.split(r"(?<=\.) (?=[A-Z])", " ".join(paragraph.split()))
    plain = (s for s in found if PLAIN.fullmatch(s) and len(s.split()) in WORDS)
    return tuple(dict.fromkeys(plain))


@cache
def vocabulary() -> tuple[str, ...]:
    """The sentences' words of 5 to 9 letters, sorted; none is part of another, so that none is found in
    another's place."""
    words = sorted(set(re.findall(r"\b[a-z]{5,9}\b", " ".join(sentences()))), key=lambda w: (len(w), w))
    kept: list[str] = []
    for word in words:
        if not any(shorter in word for shorter in kept):
            kept.append(word)
    return tuple(sorted(kept))


def sha256() -> str:
    """Of the sentences: the reference, and with it every sample, differs between versions of Python."""
    return hashlib.sha256("\n".join(sentences()).encode()).hexdigest()


def hide(rng: random.Random, needles: Sequence[str], n: int) -> str:
    """n sentences, from one that is drawn on and round again, with the needles in their order at drawn depths
    between them."""
    prose = sentences()
    start = rng.randrange(len(prose))
    depths = sorted(rng.random() for _ in needles)
    text = [prose[(start + i) % len(prose)] for i in range(n)]
    # From the last, so that the places of the others stay.
    for depth, needle in reversed(list(zip(depths, needles, strict=True))):
        text.insert(int(depth * (n + 1)), needle)
    return " ".join(text)
