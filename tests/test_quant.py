"""Every weight format against gguf's numpy implementation, bit for bit.

The one exception is NaN: where gguf gives NaN the library must too, but sign and payload are the
processor's choice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from native import check, ffi, lib
from pyllm.errors import ArgumentError, UnsupportedError

FLOATS = (Type.F32, Type.F16, Type.BF16)
# Where a block has its f16 scale and, if it has one, its f16 minimum: byte offsets.
HALVES: dict[Type, tuple[int, ...]] = {
    Type.Q4_0: (0,),
    Type.Q4_1: (0, 2),
    Type.Q5_0: (0,),
    Type.Q5_1: (0, 2),
    Type.Q8_0: (0,),
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
    Type.IQ4_NL: (0,),
    Type.IQ4_XS: (0,),
}
BLOCKS = tuple(HALVES)
TYPES = FLOATS + BLOCKS
UNSUPPORTED = sorted({-1, 4, 5, 1000} | {int(t) for t in Type} - {int(t) for t in TYPES})

# Zero, subnormal, smallest normal, one, largest, infinite and NaN halves, of both signs.
EXTREME_HALVES = [
    half | sign
    for half in (0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0x7C00, 0x7C01, 0x7E00)
    for sign in (0, 0x8000)
]
# A NaN that no conversion makes: halves and bfloat16 leave the low bits of the float zero.
POISON = 0x7FC0DEAD
GUARD = 8

seeds = st.integers(0, 2**32 - 1)
types = pytest.mark.parametrize("quant", TYPES, ids=lambda t: t.name)
block_types = pytest.mark.parametrize("quant", BLOCKS, ids=lambda t: t.name)


def native_dequantize(quant: Type, data: NDArray[np.uint8], start: int = 0) -> NDArray[np.float32]:
    """data: bytes of whole blocks. They are read at `start` bytes after an aligned address."""
    block, size = GGML_QUANT_SIZES[quant]
    n = data.size // size * block
    shifted = np.zeros(start + data.size, np.uint8)
    shifted[start:] = data.ravel()
    out = np.full(n + GUARD, POISON, np.uint32)
    check(lib.hook_dequantize(quant, ffi.from_buffer(shifted) + start, ffi.from_buffer("float *", out), n))
    assert (out[n:] == POISON).all(), "written past the end"
    assert (out[:n] != POISON).all(), "left unwritten"
    return out[:n].view(np.float32)


def gguf_dequantize(quant: Type, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        return np.asarray(dequantize(data.reshape(-1), quant), np.float32).reshape(-1)


def assert_same_floats(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(actual.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def random_blocks(quant: Type, seed: int, n: int) -> NDArray[np.uint8]:
    """(n, bytes of a block): any bytes, scales included."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, GGML_QUANT_SIZES[quant][1]), np.uint8)


def put_halves(quant: Type, blocks: NDArray[np.uint8], halves: NDArray[np.uint16]) -> None:
    """halves: (n, scale and minimum) bits."""
    for column, offset in enumerate(HALVES[quant]):
        blocks[:, offset : offset + 2] = halves[:, column, None].view(np.uint8)


@types
@given(seed=seeds, n=st.integers(1, 40), start=st.integers(0, 8).map(lambda i: 2 * i))
def test_random_blocks(quant: Type, seed: int, n: int, start: int) -> None:
    blocks = random_blocks(quant, seed, n)
    assert_same_floats(native_dequantize(quant, blocks, start), gguf_dequantize(quant, blocks))


@types
@given(seed=seeds)
def test_every_byte_value_at_every_place(quant: Type, seed: int) -> None:
    """Under ordinary scales, so that no NaN hides a value."""
    size = GGML_QUANT_SIZES[quant][1]
    blocks = (np.arange(256)[:, None] + 37 * np.arange(size)[None, :]).astype(np.uint8)
    if quant in HALVES:
        ordinary = np.random.default_rng(seed).standard_normal((256, 2)).astype(np.float16)
        put_halves(quant, blocks, ordinary.view(np.uint16))
    assert_same_floats(native_dequantize(quant, blocks), gguf_dequantize(quant, blocks))


@block_types
@given(seed=seeds)
def test_zero_huge_and_non_finite_scales(quant: Type, seed: int) -> None:
    pairs = np.array([(d, m) for d in EXTREME_HALVES for m in EXTREME_HALVES], np.uint16)
    blocks = random_blocks(quant, seed, len(pairs))
    put_halves(quant, blocks, pairs)
    expected = gguf_dequantize(quant, blocks)
    assert_same_floats(native_dequantize(quant, blocks), expected)
    if len(HALVES[quant]) == 1:  # with a minimum too, NaN there hides the rest
        assert np.isinf(expected).any()
        assert np.isnan(expected).any()


@given(seed=seeds, n=st.integers(1, 300), start=st.integers(0, 3))
def test_f32_is_copied_with_its_nans(seed: int, n: int, start: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**32, n, np.uint32)
    values[::3] |= np.uint32(0x7F800001)
    np.testing.assert_array_equal(
        native_dequantize(Type.F32, values.view(np.uint8), 2 * start).view(np.uint32), values
    )


def unpack(
    quant: Type, block: NDArray[np.uint8]
) -> tuple[NDArray[np.uint16], NDArray[np.int16], NDArray[np.uint8], NDArray[np.uint8]]:
    """d and m bits (2,), scale (16,), min (16,), q (256,)."""
    d_m, scale = np.full(2, POISON & 0xFFFF, np.uint16), np.full(16, 0x7EAD, np.int16)
    low, q = np.full(16, 0xAD, np.uint8), np.full(256, 0xAD, np.uint8)
    pointers = (
        ffi.from_buffer("uint16_t *", d_m),
        ffi.from_buffer("int16_t *", scale),
        ffi.from_buffer("uint8_t *", low),
        ffi.from_buffer("uint8_t *", q),
    )
    check(lib.hook_unpack(quant, ffi.from_buffer(block), *pointers))
    return d_m, scale, low, q


@block_types
@given(seed=seeds)
def test_the_formula_over_unpacked_fields(quant: Type, seed: int) -> None:
    """What kernels and repacking rely on: the fields' ranges, and the formula of quant.h over them."""
    traits = quant_traits(quant)
    block = random_blocks(quant, seed, 1)[0]
    d_m, scale, low, q = unpack(quant, block)
    groups = traits.block // traits.group
    scale, low = scale[:groups], low[:groups]
    q = q[: traits.block].reshape(groups, traits.group)

    assert q.max() < 2**traits.bits
    assert -128 <= scale.min() <= scale.max() <= 127
    assert traits.scaled or (groups == 1 and scale[0] == low[0] == 1)
    assert traits.has_min or d_m[1] == 0

    with np.errstate(all="ignore"):
        d, m = d_m.view(np.float16).astype(np.float32)
        x = (d * scale.astype(np.float32))[:, None] * (q.astype(np.float32) - np.float32(traits.offset))
        if traits.has_min:
            x = x + (m * low.astype(np.float32))[:, None]
    assert_same_floats(x.ravel(), gguf_dequantize(quant, block))


def quant_traits(quant: int) -> Any:
    """hook_quant_traits *"""
    out = ffi.new("hook_quant_traits *")
    check(lib.hook_quant_type(quant, out))
    return out


@types
def test_the_table_agrees_with_gguf(quant: Type) -> None:
    traits = quant_traits(quant)
    assert ffi.string(traits.name).decode() == quant.name
    assert (traits.block, traits.bytes) == GGML_QUANT_SIZES[quant]
    assert bool(traits.has_min) == (quant in HALVES and len(HALVES[quant]) == 2)
    assert bool(traits.bits) == (quant in HALVES)


def test_supported_names_are_the_types() -> None:
    assert set(ffi.string(lib.hook_quant_supported()).decode().split(", ")) == {quant.name for quant in TYPES}


@pytest.mark.parametrize("quant", UNSUPPORTED)
def test_other_types_are_refused(quant: int) -> None:
    out = np.full(256, POISON, np.uint32)
    data = np.zeros(1024, np.uint8)
    with pytest.raises(UnsupportedError):
        quant_traits(quant)
    with pytest.raises(UnsupportedError):
        check(lib.hook_dequantize(quant, ffi.from_buffer(data), ffi.from_buffer("float *", out), 256))
    assert (out == POISON).all()


@pytest.mark.parametrize(("quant", "n"), [(Type.Q4_0, 31), (Type.Q4_K, 32), (Type.Q4_0, -32)])
def test_part_of_a_block_is_refused(quant: Type, n: int) -> None:
    out = np.full(64, POISON, np.uint32)
    data = np.zeros(1024, np.uint8)
    with pytest.raises(ArgumentError):
        check(lib.hook_dequantize(quant, ffi.from_buffer(data), ffi.from_buffer("float *", out), n))
    assert (out == POISON).all()


def test_unpacking_floats_is_refused() -> None:
    with pytest.raises(ArgumentError):
        unpack(Type.F16, np.zeros(256, np.uint8))


ALL_HALVES = np.arange(1 << 16, dtype=np.uint16)


def test_every_half_to_float() -> None:
    out = np.full(1 << 16, POISON, np.uint32).view(np.float32)
    lib.hook_f16_to_f32(ffi.from_buffer("uint16_t *", ALL_HALVES), ffi.from_buffer("float *", out), out.size)
    assert_same_floats(out, ALL_HALVES.view(np.float16).astype(np.float32))


def test_every_bfloat16_to_float() -> None:
    out = np.full(1 << 16, POISON, np.uint32)
    lib.hook_bf16_to_f32(ffi.from_buffer("uint16_t *", ALL_HALVES), ffi.from_buffer("float *", out), out.size)
    np.testing.assert_array_equal(out, ALL_HALVES.astype(np.uint32) << 16)


def assert_converts_to_halves(x: NDArray[np.float32]) -> None:
    out = np.full(x.size, 0x7EAD, np.uint16)
    lib.hook_f32_to_f16(ffi.from_buffer("float *", x), ffi.from_buffer("uint16_t *", out), x.size)
    with np.errstate(all="ignore"):
        expected = x.astype(np.float16)
    nan = np.isnan(x)
    np.testing.assert_array_equal(np.isnan(out.view(np.float16)), nan)
    np.testing.assert_array_equal(out[~nan], expected.view(np.uint16)[~nan])


@given(seed=seeds)
def test_any_float_to_half(seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 2**32, 4096, np.uint32)
    in_range = bits & np.uint32(0x8FFFFFFF) | np.uint32(0x30000000)  # exponents around those of halves
    assert_converts_to_halves(np.concatenate([bits, in_range]).view(np.float32))


def test_floats_between_halves() -> None:
    """The middle of every two neighbouring halves, and the floats next to it on either side."""
    finite = ALL_HALVES[:0x7C01].view(np.float16).astype(np.float32)
    finite[-1] = 65536  # what the first half beyond the largest would be
    middle = (finite[1:] + finite[:-1]) / 2
    x = np.concatenate(
        [finite, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32("inf"))]
    )
    assert_converts_to_halves(np.concatenate([x, -x]))
