"""Stages that work on one token at a time, on the CPU and as emulated CUDA kernels, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import emulated
from native import check
from pyllm.reference.model import rounded_to_int16

SEEDS = st.integers(0, 2**32 - 1)
DEVICES = ("cpu", "cuda")


def floats(x: NDArray[np.float32]) -> Any:
    assert x.dtype == np.float32
    assert x.flags.c_contiguous
    return emulated.ffi.from_buffer("float[]", x)


def norm(
    device: str, x: NDArray[np.float32], w: NDArray[np.float32], eps: float
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """The norm of x (n, cols), and its rounded form where cols is a multiple of 32."""
    values = np.full_like(x, np.nan)
    rounded = np.full_like(x, np.nan) if x.shape[1] % 32 == 0 else None
    err = emulated.ffi.new("pyllm_error *")
    null = emulated.ffi.NULL
    check(
        emulated.lib.hook_norm(
            device.encode(), null, floats(x), floats(w), eps, *x.shape, floats(values),
            null if rounded is None else floats(rounded), err,
        ),
        err,
    )  # fmt: skip
    return values, rounded


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=20, deadline=None)
@given(
    seed=SEEDS,
    n=st.integers(1, 4),
    cols=st.sampled_from([16, 32, 64, 250, 288, 512, 1056]),
    exponent=st.integers(-6, 6),
)
def test_norm(device: str, seed: int, n: int, cols: int, exponent: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((n, cols)) * 10.0**exponent).astype(np.float32)
    w = rng.standard_normal(cols).astype(np.float32)
    values, rounded = norm(device, x, w, 1e-5)
    exact = x.astype(np.float64)
    exact = exact / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-5) * w
    assert np.allclose(values, exact, rtol=3e-6, atol=0)
    if rounded is not None:
        step = np.abs(values.reshape(n, -1, 32)).max(2).repeat(32, 1) / 32512
        assert (np.abs(rounded - rounded_to_int16(values)) <= step * 1.01).all()
        assert (np.abs(rounded - values) <= step * 0.51).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rounding_passes_nan_on(device: str, bad: float) -> None:
    x, w = np.ones((2, 64), np.float32), np.ones(64, np.float32)
    x[1, 40] = bad
    _, rounded = norm(device, x, w, 1e-5)
    assert rounded is not None
    assert np.isfinite(rounded[0]).all()
    assert np.isnan(rounded[1, 32:]).all()
