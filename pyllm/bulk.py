"""Where a query's bulk begins, and how many keys are in it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

PAGE = 64  # tokens; keys join the bulk by whole pages

Counts = NDArray[np.int64]


def first_with_bulk(window: int, sinks: int) -> int:
    """Position of the first query that has a bulk: a page behind the sinks has left its window."""
    return bulk_from(window, sinks) - 1


def bulk_from(window: int, sinks: int) -> int:
    """Tokens of the shortest text whose last query has a bulk."""
    return window + sinks + PAGE


def bulk_tokens(n: NDArray[np.integer[Any]], window: int, sinks: int) -> Counts:
    """Keys in the bulk of the last of n tokens, elementwise."""
    found: Counts = PAGE * (np.maximum(0, n - window - sinks) // PAGE)
    return found
