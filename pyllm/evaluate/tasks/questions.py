"""Question answering over distractors: made-up people, and a question about one of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pyllm.evaluate.tasks import words
from pyllm.evaluate.tasks.draft import Draft, Task

ONLY = "Only give me the answer and do not output any other words."
# A question, how its answer begins, and what may follow.
QUESTIONS = (
    ("In which town did {name} grow up?", "{name} grew up in", words.TOWNS),
    ("What trade did {name} learn?", "{name} learned the trade of a", words.TRADES),
    ("Which instrument does {name} play?", "{name} plays the", words.INSTRUMENTS),
)


def draw(rng: random.Random, n: int) -> Draft:
    """n: documents, one of which has the answer, that no other has."""
    kind = rng.randrange(len(QUESTIONS))
    question, opening, choices = QUESTIONS[kind]
    depth = rng.random()
    names = words.names(rng)
    asked = next(names)
    facts = [rng.choice(values) for *_, values in QUESTIONS]
    documents = [_document(asked, facts)]
    for _ in range(n - 1):
        others = [rng.choice(values) for *_, values in QUESTIONS]
        while others[kind] == facts[kind]:
            others[kind] = rng.choice(choices)
        documents.append(_document(next(names), others))
    documents.insert(int(depth * n), documents.pop(0))
    numbered = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, 1))
    text = (
        f"Answer the question based on the given documents. {ONLY}\n\n"
        f"The following are given documents.\n\n{numbered}\n\n"
        f"Answer the question based on the given documents. {ONLY}\n\n"
        f"Question: {question.format(name=asked)}"
    )
    return Draft(text, f"Answer: {opening.format(name=asked)}", (facts[kind],), chance=1 / n)


def _document(name: str, facts: Sequence[str]) -> str:
    town, trade, instrument = facts
    return (
        f"{name} grew up in {town} as the youngest of a large family. After school {name} learned the trade "
        f"of a {trade} and kept to it for many years. On Sundays {name} plays the {instrument} with friends."
    )


TASKS = (Task("qa", "one fact about one of many made-up people", draw, 4, 32),)
