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
from pyllm.errors import UnsupportedError
from test_cuda_rows import floats
from test_linear import FLOATS, QUANTIZED, SEEDS, assert_close
from tiny_models import random_matrix

FEW_TOKENS = 4  # up to here activations are rounded to 16 bits and products are exact, beyond halves multiply
# Around the tiles of rows and tokens; groups of 32 columns around a step's, and what three steps hold.
ROWS = st.sampled_from([1, 2, 15, 16, 17, 33, 64, 65, 127, 128, 130, 257])
TOKENS = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 32, 33, 64, 65, 129])
GROUPS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 13])
# Three shapes each that linear_gemm.cu gives to its small, medium and large tile on two multiprocessors.
TILES = [(1, 33), (130, 64), (257, 32), (128, 129), (130, 65), (257, 33), (130, 129), (257, 65), (17, 257)]
# Where a block of a format of scaled minimums has its quants.
QUANTS_AT = {Type.Q2_K: (16, 80), Type.Q4_K: (16, 144), Type.Q5_K: (16, 176)}
SCALED = (*QUANTS_AT, Type.Q3_K, Type.Q6_K, Type.IQ4_XS)


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
            b"cuda", ffi.NULL, 1, kind.value, ffi.from_buffer(data), rows, cols, floats(x), n, 16,
            ffi.NULL if bias is None else floats(bias), onto is not None, floats(out), floats(seen), err,
        ),
        err,
    )  # fmt: skip
    return out, seen


def random_input(rng: np.random.Generator, n: int, cols: int) -> NDArray[np.float32]:
    """Tokens of very different size, which halves alone could not hold."""
    return (rng.standard_normal((n, cols)) * 10.0 ** rng.integers(-3, 7, (n, 1))).astype(np.float32)


def half_rounding(kind: Type, weights: NDArray[Any], rows: int, cols: int) -> NDArray[np.float64]:
    """How far a weight (rows, cols) may be off as the matrix units see it.

    Rounding to halves is off by 2^-11 at most, relative: all here are multiples of 2^-24, so small numbers
    are exact. A weight is rounded once; before that, in scaled formats, scale and minimum are, whose parts of
    it are w - m and m.
    """
    w = quants.dequantize(weights, kind).reshape(rows, cols).astype(np.float64)
    if kind not in SCALED:
        return np.abs(w) / 2**11
    m = np.zeros_like(w)
    if kind in QUANTS_AT:
        bare = weights.reshape(-1, quants.GGML_QUANT_SIZES[kind][1]).copy()
        bare[:, slice(*QUANTS_AT[kind])] = 0
        m = quants.dequantize(bare.reshape(weights.shape), kind).reshape(rows, cols).astype(np.float64)
    parts = np.abs(w - m) + np.abs(m)
    return (np.abs(w) + parts * (1 + 2.0**-11)) / 2**11


def check_product(
    kind: Type, rng: np.random.Generator, rows: int, n: int, cols: int, bias: bool, add: bool
) -> None:
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
    rounding = np.abs(seen).astype(np.float64) @ half_rounding(kind, weights, rows, cols).T if halves else 0.0
    for part in (b, onto):
        if part is not None:
            exact = exact + part
            magnitude = magnitude + np.abs(part)
    assert np.isfinite(ours).all()
    assert (np.abs(ours - exact) <= 4e-6 * magnitude + rounding + 1e-30).all()


@pytest.mark.parametrize("kind", FLOATS + QUANTIZED, ids=lambda kind: kind.name)
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, rows=ROWS, n=TOKENS, groups=GROUPS, bias=st.booleans(), add=st.booleans())
def test_product(kind: Type, seed: int, rows: int, n: int, groups: int, bias: bool, add: bool) -> None:
    rng = np.random.default_rng(seed)
    block = quants.GGML_QUANT_SIZES[kind][0]
    cols = 2 * int(rng.integers(1, 70)) if kind in FLOATS else -(-32 * groups // block) * block
    check_product(kind, rng, rows, n, cols, bias, add)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_every_tile(rng: np.random.Generator, kind: Type) -> None:
    block = quants.GGML_QUANT_SIZES[kind][0]
    for i, (rows, n) in enumerate(TILES):
        cols = 768 if block == 256 and i % 3 == 0 else 256 if block == 256 else 32 * (13, 7, 2)[i % 3]
        check_product(kind, rng, rows, n, cols, i % 2 == 0, i % 4 < 2)


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
    weights = random_matrix(rng, kind, 130, 768, 1.0)
    x = random_input(rng, 140, 768)
    together, _ = linear(kind, weights, x, 130)
    for first, end in [(60, 131), (120, 131)]:  # the large tile above, the medium, the small
        some, _ = linear(kind, weights, x[first:end], 130)
        assert np.array_equal(together[first:end], some)
    few, _ = linear(kind, weights, x[:4], 130)
    for i in range(4):
        alone, _ = linear(kind, weights, x[i : i + 1], 130)
        assert np.array_equal(few[i : i + 1], alone)


def test_more_rows_than_a_grid_counts_are_refused() -> None:
    rows = 65535 * 64 + 1
    with pytest.raises(UnsupportedError, match=f"test matrix has {rows} rows: on a GPU at most {rows - 1}"):
        linear(Type.F16, np.zeros(2 * rows, np.float16), np.ones((1, 2), np.float32), rows)
