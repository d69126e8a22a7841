"""The emulated CUDA linear stage: every weight format against dequantized weights in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from emulated import check, ffi, lib
from test_cuda_rows import floats
from test_linear import FLOATS, QUANTIZED, SEEDS, assert_close
from tiny_models import random_matrix

FEW_TOKENS = 4  # up to here activations are rounded to 16 bits and products are exact, beyond halves multiply
ROWS = st.sampled_from([1, 2, 15, 16, 17, 33, 127, 128, 130])
TOKENS = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 64, 65, 129])


def linear(
    kind: Type, weights: NDArray[Any], x: NDArray[np.float32], rows: int,
    bias: NDArray[np.float32] | None = None, onto: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:  # fmt: skip
    """x (n, cols) times weights (rows, bytes): (n, rows), and x as the kernel sees it."""
    n, cols = x.shape
    out = np.full((n, rows), np.nan, np.float32) if onto is None else onto.copy()
    seen = np.empty_like(x)
    err = ffi.new("pyllm_error *")
    data = np.ascontiguousarray(weights).view(np.uint8).reshape(-1)
    check(
        lib.hook_linear(
            b"cuda", ffi.NULL, 1, kind.value, ffi.from_buffer(data), rows, cols, floats(x), n,
            ffi.NULL if bias is None else floats(bias), onto is not None, floats(out), floats(seen), err,
        ),
        err,
    )  # fmt: skip
    return out, seen


def random_input(rng: np.random.Generator, n: int, cols: int) -> NDArray[np.float32]:
    """Tokens of very different size, which halves alone could not hold."""
    return (rng.standard_normal((n, cols)) * 10.0 ** rng.integers(-3, 7, (n, 1))).astype(np.float32)


@pytest.mark.parametrize("kind", FLOATS + QUANTIZED, ids=lambda kind: kind.name)
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, rows=ROWS, n=TOKENS, blocks=st.integers(1, 3), bias=st.booleans(), add=st.booleans())
def test_product(kind: Type, seed: int, rows: int, n: int, blocks: int, bias: bool, add: bool) -> None:
    rng = np.random.default_rng(seed)
    cols = blocks * max(quants.GGML_QUANT_SIZES[kind][0], 32)
    if kind in FLOATS:
        cols = 2 * int(rng.integers(1, 70))
    weights = random_matrix(rng, kind, rows, cols, 1.0)
    x = random_input(rng, n, cols)
    b = rng.standard_normal(rows).astype(np.float32) if bias else None
    onto = rng.standard_normal((n, rows)).astype(np.float32) if add else None
    ours, seen = linear(kind, weights, x, rows, b, onto)
    w = quants.dequantize(weights, kind).reshape(rows, cols).astype(np.float64)
    halves = kind in QUANTIZED and n > FEW_TOKENS
    # One step of 16 bits of the largest of 32, or of 11 bits of each and of what a token's largest leaves.
    near = np.abs(x) / 2**10 + np.abs(x).max(1, keepdims=True) / 2**24
    step = near if halves else np.abs(x).max(1, keepdims=True) / 32512
    assert (np.abs(seen - x) <= (step * 0.51 if kind in QUANTIZED else 0)).all()
    exact = seen.astype(np.float64) @ w.T
    magnitude = np.abs(seen) @ np.abs(w).T + np.abs(seen).sum(1, keepdims=True) * np.abs(w).max()
    # Weights become halves: half a unit of 2^-10, and 2^-25 where they are small.
    rounding = np.abs(seen).astype(np.float64) @ (np.abs(w) / 2**11 + 2.0**-25).T if halves else 0.0
    for part in (b, onto):
        if part is not None:
            exact = exact + part
            magnitude = magnitude + np.abs(part)
    assert np.isfinite(ours).all()
    assert (np.abs(ours - exact) <= 4e-6 * magnitude + rounding + 1e-30).all()


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
@settings(max_examples=3, deadline=None)
@given(seed=SEEDS)
def test_every_byte_pattern(kind: Type, seed: int) -> None:
    """Random bytes, so every quant and scale code occurs; only the f16 scales are kept finite."""
    rng = np.random.default_rng(seed)
    block, size = quants.GGML_QUANT_SIZES[kind]
    rows, cols = 19, 2 * max(block, 32)
    weights = random_matrix(rng, kind, rows, cols, 1.0)
    raw = rng.integers(0, 256, (rows, cols // block * size), np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        finite = quants.dequantize(raw, kind).reshape(rows, cols)
    raw = np.where(np.isfinite(finite).all(1, keepdims=True), raw, weights.view(np.uint8).reshape(raw.shape))
    ours, seen = linear(kind, raw, rng.standard_normal((FEW_TOKENS, cols)).astype(np.float32), rows)
    w = quants.dequantize(raw, kind).reshape(rows, cols).astype(np.float64)
    magnitude = np.abs(seen).sum(1, keepdims=True) * np.abs(w).max(1) * 32
    assert_close(ours, seen.astype(np.float64) @ w.T, magnitude)


@pytest.mark.parametrize("kind", [Type.F16, Type.Q4_K, Type.Q6_K], ids=lambda kind: kind.name)
def test_a_token_does_not_depend_on_its_batch(rng: np.random.Generator, kind: Type) -> None:
    """Among few tokens, and among many; the two round differently."""
    weights = random_matrix(rng, kind, 70, 256, 1.0)
    x = random_input(rng, 140, 256)
    together, _ = linear(kind, weights, x, 70)
    some, _ = linear(kind, weights, x[120:131], 70)
    assert np.array_equal(together[120:131], some)
    few, _ = linear(kind, weights, x[:4], 70)
    for i in range(4):
        alone, _ = linear(kind, weights, x[i : i + 1], 70)
        assert np.array_equal(few[i : i + 1], alone)
