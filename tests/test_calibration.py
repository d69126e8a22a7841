"""Calibrations as values: equal by contents, constant, and refusing what fits no model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pyllm import ArgumentError
from pyllm.calibration import Calibration


def arrays(rng: np.random.Generator) -> dict[str, Any]:
    """Of 2 layers with 4 heads on 2 key/value heads of 16 dimensions."""
    root = rng.standard_normal((2, 2, 16, 16))
    return {
        "coefficients": rng.standard_normal((2, 4, 3)),
        "means": rng.standard_normal((2, 2, 16)),
        "covariances": root @ root.swapaxes(-1, -2),
        "page_variances": rng.random((2, 2, 16)),
        "query_squares": rng.random((2, 2, 16)),
        "query_means": rng.standard_normal((2, 2, 16)),
        "positions": (16, 4096),
    }


def test_equal_by_contents(rng: np.random.Generator) -> None:
    given = arrays(rng)
    calibration = Calibration(**given)
    copy = Calibration(
        **{name: value if name == "positions" else value.copy() for name, value in given.items()}
    )
    assert calibration == copy
    assert hash(calibration) == hash(copy)
    assert len({calibration, copy}) == 1
    for change in (
        {"positions": (16, 4097)},
        {"moments": "calibrated"},
        {"model": "0123456789abcdef"},
        {"coefficients": given["coefficients"] + 1},
        {"means": given["means"] + 1},
        {"covariances": given["covariances"] + 1},
        {"page_variances": given["page_variances"] + 1},
        {"query_squares": given["query_squares"] + 1},
        {"query_means": given["query_means"] + 1},
    ):
        assert Calibration(**{**given, **change}) != calibration
    assert calibration != given


def test_arrays_are_constant_copies(rng: np.random.Generator) -> None:
    given = arrays(rng)
    calibration = Calibration(**given)
    for name in given.keys() - {"positions"}:
        held = getattr(calibration, name)
        assert held.dtype == np.float32
        np.testing.assert_array_equal(held, given[name].astype(np.float32))
        with pytest.raises(ValueError, match="read-only"):
            held[...] = 0
        given[name][...] = 0
        assert held.any()


def test_channels_that_move_scores_most_come_first(rng: np.random.Generator) -> None:
    given = arrays(rng)
    found = Calibration(**given).channels
    assert found.dtype == np.uint16
    for layer, head in np.ndindex(2, 2):
        squares, variances = (given[name][layer, head] for name in ("query_squares", "page_variances"))
        moved = [squares[i] * variances[i] for i in found[layer, head]]
        assert sorted(found[layer, head]) == list(range(16))
        assert moved == sorted(moved, reverse=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coefficients": np.zeros((2, 4))}, "shape"),
        ({"coefficients": np.zeros((2, 4, 2))}, "shape"),
        ({"coefficients": np.zeros((3, 4, 3))}, "shape"),
        ({"coefficients": np.zeros((2, 3, 3))}, "one model"),
        ({"coefficients": np.zeros((2, 0, 3))}, "shape"),
        ({"means": np.zeros((2, 2, 15))}, "one model"),
        ({"covariances": np.zeros((2, 2, 16, 15))}, "one model"),
        ({"page_variances": np.zeros((2, 2, 15))}, "one model"),
        ({"page_variances": np.full((2, 2, 16), np.inf)}, "page_variances hold NaN or infinity"),
        ({"query_squares": np.zeros((2, 2, 15))}, "one model"),
        ({"query_squares": np.full((2, 2, 16), np.nan)}, "query_squares hold NaN"),
        ({"query_means": np.zeros((2, 1, 16))}, "one model"),
        ({"query_means": np.full((2, 2, 16), np.inf)}, "query_means hold NaN or infinity"),
        ({"coefficients": np.full((2, 4, 3), np.nan)}, "coefficients hold NaN"),
        ({"means": np.full((2, 2, 16), np.inf)}, "means hold NaN or infinity"),
        ({"positions": (16, 16)}, "no range"),
        ({"positions": (-1, 16)}, "no range"),
        ({"moments": "other"}, "'other'"),
    ],
)
def test_refused(rng: np.random.Generator, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Calibration(**{**arrays(rng), **change})
