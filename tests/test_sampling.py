"""Drawing a token: penalties at the edge of what floats hold."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pyllm import _native

FORBIDDEN = -np.inf
DRAWS = 400
PLAIN: dict[str, float] = {
    "temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0,
    "repeat_penalty": 1, "frequency_penalty": 0, "presence_penalty": 0,
}  # fmt: skip


def draw(logits: list[float], recent: list[int], params: dict[str, float]) -> dict[int, int]:
    """How often each token came up."""
    rng, array = np.zeros(1, np.uint64), np.array(logits, np.float32)
    given = {**PLAIN, **params}
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


# The first draw of this seed is 1 - 2^-53: past the sum of all that rounding left.
LAST = 0x31628AF67B2131AB


@pytest.mark.parametrize("n", [3, 25, 100])
def test_rounding_draws_nothing_forbidden(n: int) -> None:
    logits = np.array([1.0] * n + [FORBIDDEN] * 3, np.float32)
    assert _native.sample(logits, PLAIN, np.empty(0, np.int32), np.array([LAST], np.uint64)) < n


def test_a_top_p_of_nothing_is_the_best() -> None:
    assert set(draw([1.0, 1.1, 1.05], [], {"top_p": 0})) == {1}
