"""Drawing a token: penalties at the edge of what floats hold."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pyllm import _native

FORBIDDEN = -np.inf
DRAWS = 400


def draw(logits: list[float], recent: list[int], params: dict[str, float]) -> dict[int, int]:
    """How often each token came up."""
    plain: dict[str, float] = {
        "temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0,
        "repeat_penalty": 1, "frequency_penalty": 0, "presence_penalty": 0,
    }  # fmt: skip
    rng, array = np.zeros(1, np.uint64), np.array(logits, np.float32)
    given = {**plain, **params}
    drawn = (_native.sample(array, given, np.array(recent, np.int32), rng) for _ in range(DRAWS))
    return dict(Counter(drawn))


@pytest.mark.parametrize(
    ("params", "logits", "expected"),
    [
        # Both go past the largest float: they are as good as each other, and the third is out of the race.
        ({"repeat_penalty": 1e-30}, [1e10, 2e10, 5.0, FORBIDDEN], {0, 1}),
        # Past the lowest one: still tokens, but the third.
        ({"repeat_penalty": 1e30}, [-1e10, -2e10, 5.0, FORBIDDEN], {2}),
        # All that is allowed is past it.
        ({"repeat_penalty": 1e30}, [-1e10, -2e10, FORBIDDEN, FORBIDDEN], {0, 1}),
        # Past the largest in one step and back in the next, whose own product overflows.
        ({"repeat_penalty": 1e-30, "frequency_penalty": 3e38}, [1e10, 1.0, 50.0, FORBIDDEN], {2}),
        ({"frequency_penalty": -3e38}, [1.0, 2.0, 5.0, FORBIDDEN], {0, 1}),
    ],
)
def test_penalties_that_overflow(params: dict[str, float], logits: list[float], expected: set[int]) -> None:
    recent = [0, 0, 1, 1, 3, 3]
    drawn = draw(logits, recent, params)
    assert set(drawn) == expected
    assert max(drawn.values()) < DRAWS * 0.6 or len(expected) == 1
    assert set(draw(logits, recent, {**params, "temperature": 0})) <= expected
    assert set(draw(logits, recent, {**params, "top_k": 3, "top_p": 0.99, "min_p": 0.01})) == expected
