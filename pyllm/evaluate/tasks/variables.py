"""Variable tracking: a value that is handed on from variable to variable, hidden in prose."""

from __future__ import annotations

import itertools
import random
import string

from pyllm.evaluate.tasks.draft import Draft, Task
from pyllm.evaluate.tasks.haystack import hide

VARIABLES = 5  # one that is given the value, and four that are given another's


def draw(rng: random.Random, n: int) -> Draft:
    names: list[str] = []
    while len(names) < VARIABLES:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    value = rng.randrange(10**4, 10**5)
    lines = [f"VAR {names[0]} = {value}."]
    lines += [f"VAR {name} = VAR {before}." for before, name in itertools.pairwise(names)]
    text = (
        "Memorize and track the chain of variable assignments hidden in the following text. For example, "
        "after VAR X = 7. VAR Y = VAR X. the variables that are assigned the value 7 are X, Y.\n\n"
        f"{hide(rng, lines, n)}\n\n"
        f"Question: Find all variables that are assigned the value {value} in the text above."
    )
    opening = (
        "Answer: According to the chain of variable assignments in the text above, "
        f"{VARIABLES} variables are assigned the value {value}, they are:"
    )
    return Draft(text, opening, tuple(names))


TASKS = (Task("vt", "five variables that were given one value", draw, 8, 60),)
