"""Stages that work on one token at a time, on the CPU and as emulated CUDA kernels, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import emulated
from native import check
from pyllm.reference.model import rounded_to_int16
from tiny_models import random_matrix

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
def test_a_norm_past_what_floats_hold_is_no_row_of_zeros(device: str) -> None:
    x, w = np.ones((2, 64), np.float32), np.ones(64, np.float32)
    x[1, 40] = 1e20
    values, _ = norm(device, x, w, 1e-5)
    assert np.isfinite(values[0]).all()
    assert np.isnan(values[1]).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rounding_passes_nan_on(device: str, bad: float) -> None:
    x, w = np.ones((2, 64), np.float32), np.ones(64, np.float32)
    x[1, 40] = bad
    _, rounded = norm(device, x, w, 1e-5)
    assert rounded is not None
    assert np.isfinite(rounded[0]).all()
    assert np.isnan(rounded[1, 32:]).all()


def swiglu(
    device: str, gate: NDArray[np.float32], up: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The result for (n, cols), and its rounded form."""
    out, rounded = np.full_like(gate, np.nan), np.full_like(gate, np.nan)
    err = emulated.ffi.new("pyllm_error *")
    arrays = floats(gate), floats(up), *gate.shape, floats(out), floats(rounded)
    check(emulated.lib.hook_swiglu(device.encode(), emulated.ffi.NULL, *arrays, err), err)
    return out, rounded


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [1, 4, 5, 7])
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, cols=st.sampled_from([32, 288, 1056]))
def test_swiglu(device: str, n: int, seed: int, cols: int) -> None:
    rng = np.random.default_rng(seed)
    gate = (rng.standard_normal((n, cols)) * 10 ** rng.uniform(-2, 3, (n, cols))).astype(np.float32)
    up = rng.standard_normal((n, cols)).astype(np.float32)
    gate[:, :4] = [0, -200, 200, -1e30]
    out, rounded = swiglu(device, gate, up)
    x = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        exact = x / (1 + np.exp(-x)) * up
    # The CPU's e^x is that of x log2(e), rounded: an error in proportion to |x|.
    assert (np.abs(out - exact) <= 3e-6 * (1 + np.abs(x) / 12) * np.abs(exact) + 1e-35).all()
    largest = np.abs(out).max(1, keepdims=True)
    halves = device == "cuda" and n > 4
    step = np.abs(out) / 2**10 + largest / 2**24 if halves else largest / 32512
    assert (np.abs(rounded - out) <= 0.51 * step).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_halves_pass_nan_on(bad: float) -> None:
    gate, up = np.ones((6, 64), np.float32), np.ones((6, 64), np.float32)
    up[1, 40] = bad
    _, rounded = swiglu("cuda", gate, up)
    assert np.isnan(rounded[1]).all()
    assert np.isfinite(np.delete(rounded, 1, 0)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [Type.F32, Type.Q4_1, Type.Q6_K], ids=lambda kind: kind.name)
def test_embeddings_and_angles(rng: np.random.Generator, device: str, kind: Type) -> None:
    cols, half, position = 256, 20, 100_000
    table = random_matrix(rng, kind, 30, cols, 1.0)
    data = np.ascontiguousarray(table).view(np.uint8).reshape(-1)
    tokens = np.array([3, 0, 29, 3, 17], np.int32)
    frequency = 10000.0 ** -(np.arange(half) / half)
    x = np.full((5, cols), np.nan, np.float32)
    cosine, sine = np.full((5, half), np.nan, np.float32), np.full((5, half), np.nan, np.float32)
    ffi = emulated.ffi
    err = ffi.new("pyllm_error *")
    check(
        emulated.lib.hook_begin(
            device.encode(), ffi.NULL, kind.value, ffi.from_buffer(data), cols,
            ffi.from_buffer("int32_t[]", tokens), 5, position, ffi.from_buffer("double[]", frequency), half,
            1.5, floats(x), floats(cosine), floats(sine), err,
        ),
        err,
    )  # fmt: skip
    assert np.array_equal(x, quants.dequantize(table, kind).reshape(30, cols)[tokens])
    angle = (position + np.arange(5))[:, None] * frequency
    assert np.allclose(cosine, 1.5 * np.cos(angle), atol=1e-6)
    assert np.allclose(sine, 1.5 * np.sin(angle), atol=1e-6)


def test_a_graph_does_its_stages_again_on_what_memory_holds_then(rng: np.random.Generator) -> None:
    x, w = rng.standard_normal((3, 96)).astype(np.float32), rng.standard_normal(96).astype(np.float32)
    out, err = np.full_like(x, np.nan), emulated.ffi.new("pyllm_error *")
    check(emulated.lib.hook_graph(b"cuda", floats(x), floats(w), 1e-5, *x.shape, floats(out), err), err)
    assert np.array_equal(out, norm("cuda", x, w, 1e-5)[0])
