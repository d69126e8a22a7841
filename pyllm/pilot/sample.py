"""The documents that a pilot evaluates: short, middling and long ones, within a limit of tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from pyllm import documents
from pyllm.errors import ArgumentError
from pyllm.evaluate.texts import Text, bos
from pyllm.files import shown
from pyllm.llm import LLM
from pyllm.survey.folder import Document, Folder


def draw(llm: LLM, folder: Folder, *, n_ctx: int, limit: int, least: int, seed: int) -> list[Text]:
    """Beginnings of documents, from the shortest to the longest, at most limit tokens together.

    Documents of fewer than `least` tokens are of no use. The others are split into as many classes of length
    as documents of their mean length fit into the limit, but at least two, and seed draws one from each.
    n_ctx: tokens of a document at most; where the drawn ones are longer than the mean, all are cut at the
    same length. Raises ArgumentError where nothing is long enough.
    """
    names = {shown(document.path): document for document in folder.documents}
    long_enough = sorted((d for d in names.values() if d.tokens >= least), key=lambda d: d.tokens)
    _require(folder, long_enough, n_ctx, limit, least)
    mean = np.mean([min(document.tokens, n_ctx) for document in long_enough])
    # Two at least where that is possible: one to choose on, one to report on.
    n_classes = min(len(long_enough), max(int(limit // mean), min(2, limit // least)))
    chosen = random.Random(seed)
    drawn = [
        long_enough[chosen.choice(indices.tolist())]
        for indices in np.array_split(np.arange(len(long_enough)), n_classes)
    ]
    cut = cut_at([min(document.tokens, n_ctx) for document in drawn], limit)
    return [_beginning(llm, folder, document, cut) for document in drawn]


def cut_at(lengths: Sequence[int], limit: int) -> int:
    """The most tokens that each text may have so that all together have at most limit."""
    room = limit
    for i, n in enumerate(sorted(lengths)):
        left = len(lengths) - i
        if n * left > room:
            return room // left
        room -= n
    return max(lengths)


def _beginning(llm: LLM, folder: Folder, document: Document, n: int) -> Text:
    ids = llm.tokenize(documents.read(folder.root / document.path), parse_special=False)
    return Text(shown(document.path), np.array([*bos(llm), *ids][:n], np.int32))


def _require(folder: Folder, long_enough: Sequence[Document], n_ctx: int, limit: int, least: int) -> None:
    if not long_enough:
        longest = max(document.tokens for document in folder.documents)
        raise ArgumentError(
            f"{folder.root}: no document is long enough: the longest has {longest} tokens, and only from "
            f"{least} tokens on is there a bulk that a policy could leave out; a smaller --window would "
            "change that"
        )
    for name, value in (("--ctx", n_ctx), ("--limit", limit)):
        if value < least:
            raise ArgumentError(
                f"{name}: {value} tokens, but a document is of use only from {least} tokens on"
            )
