"""Presets for the model, searched on the folder's own documents but not on those that are reported on."""

from __future__ import annotations

import random
from collections.abc import Collection

from pyllm import documents
from pyllm.evaluate.calibrate import PARTS, Plan, calibrate
from pyllm.files import shown
from pyllm.llm import LLM
from pyllm.profile import Profile
from pyllm.session import Progress
from pyllm.survey.folder import Folder

DECODED = 256  # tokens at the end of each text: four of the interval's blocks


def search_presets(
    llm: LLM, folder: Folder, held_out: Collection[str], plan: Plan, seed: int, progress: Progress
) -> Profile:
    """On `others`. Raises ArgumentError where they are too short, or a budget cannot be met."""
    texts = others(folder, held_out, len(PARTS) * plan.limit, seed)
    return calibrate(llm, texts, plan, progress)


def others(folder: Folder, held_out: Collection[str], n_tokens: int, seed: int) -> dict[str, str]:
    """Texts by name, none of held_out, in an order that seed draws, until they have n_tokens."""
    left = [document for document in folder.documents if shown(document.path) not in held_out]
    random.Random(seed).shuffle(left)
    taken: dict[str, str] = {}
    n = 0
    for document in left:
        if n >= n_tokens:
            break
        taken[shown(document.path)] = documents.read(folder.root / document.path)
        n += document.tokens
    return taken
