"""The linear stage: every weight format, on every instruction set, against dequantized weights in float64."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from native import check, ffi, lib
from pyllm import cpus, errors
from pyllm.reference.model import rounded_to_int8, rounded_to_int16
from pyllm.reference.weights import NARROW_TYPES
from tiny_models import random_matrix

FLOATS = (Type.F32, Type.F16, Type.BF16)
QUANTIZED = (
    Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K,
    Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS,
)  # fmt: skip
# With activations of 16 bits, and where weights have at most 6, of 8.
KINDS = [(kind, 16) for kind in FLOATS + QUANTIZED] + [
    (kind, 8) for kind in QUANTIZED if kind.name in NARROW_TYPES
]
# Where a block has its scales, and minima; of Q2_K the halves of them. Others: two bytes at the start.
SCALES = {
    Type.Q4_1: slice(4), Type.Q5_1: slice(4), Type.Q4_K: slice(16), Type.Q5_K: slice(16),
    Type.IQ4_XS: slice(8), Type.Q2_K: slice(-4, None),
    Type.Q3_K: slice(-14, None), Type.Q6_K: slice(-18, None),
}  # fmt: skip
KIND_NAMES = [f"{kind.name}-{bits}" for kind, bits in KINDS]
SEEDS = st.integers(0, 2**32 - 1)

# Around the tile of 16 rows, the kernels' 1, 2, 3, 6, 8 and 12 tokens at once, and the block of 128 tokens.
ROWS = st.sampled_from([1, 2, 15, 16, 17, 31, 33, 48, 64, 65, 80])
TOKENS = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 17, 25, 127, 128, 129, 130])


def products(isa: str) -> str:
    """The arithmetic of attention's products, as the reference names it."""
    return "bfloat16" if isa == "avx512bf16" else "float"


def available_isas() -> list[str]:
    """Instruction sets this processor runs."""
    err = ffi.new("pyllm_error *")
    x, out = ffi.new("float[32]"), ffi.new("float[32]")
    return [isa for isa in cpus.ISAS if lib.hook_rounded(isa.encode(), 16, x, out, 32, err) == 0]


ISAS = available_isas()


def floats(x: NDArray[np.float32]) -> object:
    assert x.dtype == np.float32
    assert x.flags.c_contiguous
    return ffi.from_buffer("float[]", x)


def linear(
    isa: str, kind: Type, weights: NDArray[np.uint8], x: NDArray[np.float32], rows: int,
    bias: NDArray[np.float32] | None = None, onto: NDArray[np.float32] | None = None, n_threads: int = 1,
    bits: int = 16,
) -> NDArray[np.float32]:  # fmt: skip
    """x (n, cols) times weights (rows, bytes): (n, rows). Without `onto` the output starts as NaN."""
    n, cols = x.shape
    out = np.full((n, rows), np.nan, np.float32) if onto is None else onto.copy()
    seen = np.empty_like(x)
    err = ffi.new("pyllm_error *")
    data = np.ascontiguousarray(weights).view(np.uint8).reshape(-1)
    check(
        lib.hook_linear(
            b"cpu", isa.encode(), n_threads, kind.value, ffi.from_buffer(data), rows, cols, floats(x), n,
            bits, ffi.NULL if bias is None else floats(bias), onto is not None, floats(out), floats(seen),
            err,
        ),
        err,
    )  # fmt: skip
    return out


def rounded(isa: str, x: NDArray[np.float32], bits: int = 16) -> NDArray[np.float32]:
    out = np.full_like(x, np.nan)
    err = ffi.new("pyllm_error *")
    check(lib.hook_rounded(isa.encode(), bits, floats(x), floats(out), x.size, err), err)
    return out


def assert_close(
    actual: NDArray[np.float32], exact: NDArray[np.float64], magnitude: NDArray[np.float64]
) -> None:
    """magnitude: the sum of the absolute products, to which float32 summation errors are relative."""
    assert np.isfinite(actual).all()
    assert (np.abs(actual - exact) <= 4e-6 * magnitude + 1e-30).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("kind", "bits"), KINDS, ids=KIND_NAMES)
@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, rows=ROWS, n=TOKENS, blocks=st.integers(1, 3), bias=st.booleans(), add=st.booleans())
def test_product(
    isa: str, kind: Type, bits: int, seed: int, rows: int, n: int, blocks: int, bias: bool, add: bool
) -> None:
    rng = np.random.default_rng(seed)
    block = 1 if kind in FLOATS else quants.GGML_QUANT_SIZES[kind][0]
    cols = blocks * max(block, 32) if kind not in FLOATS else 2 * int(rng.integers(1, 70))
    weights = random_matrix(rng, kind, rows, cols, 1.0)
    x = (rng.standard_normal((n, cols)) * 10.0 ** rng.integers(-3, 4)).astype(np.float32)
    b = rng.standard_normal(rows).astype(np.float32) if bias else None
    onto = rng.standard_normal((n, rows)).astype(np.float32) if add else None
    w = quants.dequantize(weights, kind).reshape(rows, cols).astype(np.float64)
    seen = (x if kind in FLOATS else rounded(isa, x, bits)).astype(np.float64)
    exact = seen @ w.T
    # Minima are added apart from the scaled quants, so cancellation is relative to both.
    magnitude = np.abs(seen) @ np.abs(w).T + np.abs(seen).sum(1, keepdims=True) * np.abs(w).max()
    for part in (b, onto):
        if part is not None:
            exact = exact + part
            magnitude = magnitude + np.abs(part)
    assert_close(linear(isa, kind, weights, x, rows, b, onto, bits=bits), exact, magnitude)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("kind", "bits"), KINDS, ids=KIND_NAMES)
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS, n=st.integers(2, 40), n_threads=st.integers(1, 4))
def test_a_token_does_not_depend_on_its_batch(
    isa: str, kind: Type, bits: int, seed: int, n: int, n_threads: int
) -> None:
    rng = np.random.default_rng(seed)
    weights = random_matrix(rng, kind, 70, 256, 1.0)
    x = rng.standard_normal((n, 256)).astype(np.float32)
    together = linear(isa, kind, weights, x, 70, n_threads=n_threads, bits=bits)
    alone = np.concatenate([linear(isa, kind, weights, x[i : i + 1], 70, bits=bits) for i in range(n)])
    assert np.array_equal(together, alone)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("kind", "bits"), KINDS[len(FLOATS) :], ids=KIND_NAMES[len(FLOATS) :])
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS, largest=st.booleans())
def test_every_byte_pattern(isa: str, kind: Type, bits: int, seed: int, largest: bool) -> None:
    """Random bytes, so every quant and scale code occurs; only the f16 scales are kept finite. largest: with
    activations of one size, which make the largest sums of products where quants are at either end too."""
    rng = np.random.default_rng(seed)
    block, size = quants.GGML_QUANT_SIZES[kind]
    rows, cols = 19, 2 * max(block, 32)
    weights = random_matrix(rng, kind, rows, cols, 1.0)
    raw = rng.integers(0, 256, (rows, cols // block * size), np.uint8)
    if largest:
        raw[: rows // 2, np.arange(raw.shape[1]) % size >= 4] = 0xFF
        some, scales = slice(rows // 2, rows - 4), SCALES.get(kind, slice(2))
        ends = raw.reshape(rows, -1, size)[some]
        ends[::2], ends[1::2] = 0xFF, 0x00
        ends[..., scales] = weights.view(np.uint8).reshape(rows, -1, size)[some, :, scales]
    with np.errstate(invalid="ignore", over="ignore"):
        finite = quants.dequantize(raw, kind).reshape(rows, cols)
    raw = np.where(np.isfinite(finite).all(1, keepdims=True), raw, weights.view(np.uint8).reshape(raw.shape))
    x = rng.standard_normal((9, cols)).astype(np.float32)
    if largest:
        x = np.where(rng.integers(0, 2, (9, 1)), np.sign(x), np.abs(x).max()).astype(np.float32)
    w = quants.dequantize(raw, kind).reshape(rows, cols).astype(np.float64)
    seen = rounded(isa, x, bits).astype(np.float64)
    magnitude = np.abs(seen).sum(1, keepdims=True) * np.abs(w).max(1) * 32
    assert_close(linear(isa, kind, raw, x, rows, bits=bits), seen @ w.T, magnitude)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("bits", "group", "most"), [(16, 32, 32512), (8, 16, 127)])
@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, exponent=st.integers(-30, 30))
def test_rounding_of_activations(
    isa: str, bits: int, group: int, most: int, seed: int, exponent: int
) -> None:
    """The reference's rounding, up to one step where a value lies between two steps."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(32 * 7) * 10.0**exponent).astype(np.float32)
    x[32:64] = 0
    reference = rounded_to_int16 if bits == 16 else rounded_to_int8
    ours, expected = rounded(isa, x, bits), reference(x[None])[0]
    step = np.abs(x.reshape(-1, group)).max(1, keepdims=True) / most
    difference = np.abs(ours - expected).reshape(-1, group)
    off = difference > 1e-2 * step
    position = np.abs(x.reshape(-1, group) / np.where(step == 0, 1, step))
    assert (np.abs(position - np.floor(position) - 0.5)[off] < 1e-2).all()
    assert (difference <= step * 1.01).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("bits", "group"), [(16, 32), (8, 16)])
def test_rounding_passes_nan_on(isa: str, bad: float, bits: int, group: int) -> None:
    x = np.ones(64, np.float32)
    x[5] = bad
    out = rounded(isa, x, bits)
    assert np.isnan(out[:group]).all()
    assert np.isfinite(out[group:]).all()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_swiglu(isa: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gate = (rng.standard_normal(80) * 10 ** rng.uniform(-2, 3)).astype(np.float32)
    up = rng.standard_normal(80).astype(np.float32)
    gate[:4] = [0, -200, 200, np.nan]
    out = np.full_like(gate, np.inf)
    err = ffi.new("pyllm_error *")
    arrays = floats(gate), floats(up), 1, 80, floats(out)
    check(lib.hook_swiglu(b"cpu", isa.encode(), *arrays, ffi.NULL, err), err)
    x = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        exact = x / (1 + np.exp(-x)) * up
    assert np.isnan(out[3])
    # e^x is that of x log2(e), rounded: an error in proportion to |x|.
    bound = 2e-6 * (1 + np.abs(x) / 8) * np.abs(exact) + 1e-35
    assert (np.delete(np.abs(out - exact) <= bound, 3)).all()


@pytest.mark.parametrize("kind", FLOATS + QUANTIZED, ids=lambda kind: kind.name)
def test_a_weight_that_is_not_finite_is_refused(kind: Type) -> None:
    rng = np.random.default_rng(7)
    weights = random_matrix(rng, kind, 20, 256, 1.0)
    raw = weights.view(np.uint8).reshape(20, -1).copy()
    raw[13] = 0xFF  # the row's scales become NaN
    if kind == Type.F32:
        raw.view(np.float32)[13, 3] = np.nan
    with pytest.raises(errors.NumericError, match="row 13"):
        linear(ISAS[0], kind, raw, np.ones((1, 256), np.float32), 20)
