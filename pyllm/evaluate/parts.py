"""Documents dealt out into parts that share no text: what is fitted, searched and reported on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice

import numpy as np

from pyllm.evaluate.texts import Text

MIXED = "rest"  # the name of blocks that are made of several documents' ends


def deal(
    documents: Mapping[str, Sequence[int]],
    start: Sequence[int],
    n_parts: int,
    *,
    n_ctx: int,
    limit: int,
    least: int,
) -> list[list[Text]]:
    """documents: token ids by name. start: what every text begins with, BOS or nothing.

    Returns n_parts lists of blocks that do not overlap, each list with a like share of every document.

    A block has at most n_ctx tokens (fewer where limit is less, or where the documents would not make a block
    for every part), a list about limit tokens. Short documents and the ends of long ones are joined into
    blocks. What is shorter than `least` tokens is left out. Of long documents, blocks are taken that lie
    evenly in them.
    """
    size = min(n_ctx, limit, sum(map(len, documents.values())) // n_parts + len(start))
    if size < least:
        return [[] for _ in range(n_parts)]
    cut = _cut(documents, size - len(start), least - len(start))
    wanted = n_parts * max(1, limit // size)
    chosen: dict[str, list[int]] = {name: [] for name in cut}
    for name, at in islice(_rounds({name: len(blocks) for name, blocks in cut.items()}), wanted):
        chosen[name].append(at)
    parts: list[list[Text]] = [[] for _ in range(n_parts)]
    turns = cycle(parts)  # from document to document, so that neither these nor parts come short
    for name, places in chosen.items():
        for at in places:
            next(turns).append(Text(f"{name}[{at}]", np.array([*start, *cut[name][at]], np.int32)))
    return parts


def _cut(documents: Mapping[str, Sequence[int]], size: int, least: int) -> dict[str, list[Sequence[int]]]:
    """Whole blocks of every document, and of what is left over of them."""
    found: dict[str, list[Sequence[int]]] = {}
    rest: list[int] = []
    for name, tokens in documents.items():
        whole = len(tokens) // size * size
        found[name] = [tokens[first : first + size] for first in range(0, whole, size)]
        rest += tokens[whole:]
    joined = [rest[first : first + size] for first in range(0, len(rest), size)]
    found[MIXED] = [block for block in joined if len(block) >= least]
    return found


def _rounds(counts: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """(name, index) of every block, the first of each document, the second of each, ..."""
    orders = {name: _spread(n) for name, n in counts.items()}
    for turn in range(max(counts.values(), default=0)):
        yield from ((name, order[turn]) for name, order in orders.items() if turn < len(order))


def _spread(n: int) -> list[int]:
    """0..n-1 so that the first of them, however many, lie evenly: by their bits read backwards."""
    return sorted(range(n), key=lambda i: int(f"{i:032b}"[::-1], 2))
