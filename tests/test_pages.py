"""The page tier of the native attention pipeline against the numpy reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulated import ffi, lib
from native import check
from pyllm.reference import attention as reference
from pyllm.reference.attention import Policy
from pyllm.reference.sketch import GRADED, PageBits, estimated_scores, rounded_weights, sketch
from test_attention import (
    FIELDS,
    SEEDS,
    WEIGHT_ROUNDING,
    Inputs,
    query_rounding,
    random_inputs,
    run,
    shapes,
    with_arrays,
)
from test_linear import ISAS, products

paged = st.builds(
    Policy,
    kind=st.sampled_from(["dense", "static", "oracle", "adaptive"]),
    n_sink=st.sampled_from([0, 16, 64]),
    n_window=st.sampled_from([1, 64, 100]),
    granularity=st.sampled_from(["head", "group"]),
    thresholds=st.sampled_from([0.5, 0.9, 1.1]),
    static_local=st.just(True),
    page_bits=st.sampled_from([2, 3, 4, GRADED]),
    page_share=st.sampled_from([0.001, 0.01, 0.1, 0.5]),
    decode_share=st.sampled_from([None, 0.002, 0.2]),
    page_drop=st.sampled_from([1.0, 0.3, 0.01]),
)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25, deadline=None)
@given(
    seed=SEEDS, shape=shapes, policy=paged, n=st.integers(100, 600), chunk=st.sampled_from([1, 7, 64, 512])
)
def test_reference(
    isa: str, seed: int, shape: tuple[int, int, int], policy: Policy, n: int, chunk: int
) -> None:
    x = random_inputs(seed, n if chunk > 1 else min(n, 250), *shape)
    check_reference(x, with_arrays(policy, shape, seed), isa, chunk)


def check_reference(x: Inputs, policy: Policy, isa: str, chunk: int, kv_type: str = "f16") -> None:
    """A share that hangs on rounding flips a read page, so a few rows may differ, and the counts a little."""
    arithmetic = products(isa) if kv_type == "f16" else "float"
    rounding = query_rounding(x) if kv_type == "q8_0" else 0.0
    ours = run(x, policy, isa, chunk=min(chunk, len(x.q)), kv_type=kv_type)
    theirs = reference.attend(
        x.q, x.k, x.v, x.scale, policy, chunk=chunk, products=arithmetic, kv_type=kv_type
    )
    error = np.abs(ours.output - theirs.output).max(2)
    mass = 1 + np.abs(theirs.decisions.local_mass).max()
    tolerance = (2e-5 * mass + rounding + WEIGHT_ROUNDING[arithmetic]) * np.abs(x.v).max()
    assert (error > tolerance).mean() <= 0.02
    expected = {name: getattr(theirs.stats, name) for name in FIELDS}
    for name, count in expected.items():
        # One flipped page counts once for each row of its tile.
        slack = 0.02 * count + 64 * x.q.shape[1] * reference.PAGE * 4 * x.q.shape[2]
        assert abs(ours.stats[name] - count) <= slack, name


def sketch_sums(
    isa: str, bits: PageBits, keys: np.ndarray, q: np.ndarray, local_mass: np.ndarray
) -> np.ndarray:
    """(n, 4) of the kernel, over a page of keys (64, d) whose channels are in the order of the sketch."""
    d, err = keys.shape[1], ffi.new("pyllm_error *")
    order = ffi.from_buffer("uint16_t[]", np.arange(d, dtype=np.uint16))
    floats = [ffi.from_buffer("float[]", np.ascontiguousarray(x, np.float32)) for x in (keys, q, local_mass)]
    sums = np.full((len(q), 4), np.nan, np.float32)
    page_bits = lib.PYLLM_GRADED if bits == GRADED else bits
    status = lib.hook_sketch_sums(
        isa.encode(),
        floats[0],
        d,
        page_bits,
        order,
        *floats[1:],
        len(q),
        ffi.from_buffer("float[]", sums),
        err,
    )
    check(status, err)
    return sums


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    bits=st.sampled_from([2, 3, 4, GRADED]),
    head_dim=st.sampled_from([16, 48, 64, 80, 128, 512]),
    n=st.integers(1, 16),
    spread=st.sampled_from([0.1, 2.0, 300.0]),
)
def test_sums_of_strips(isa: str, seed: int, bits: PageBits, head_dim: int, n: int, spread: float) -> None:
    """To four digits beside the reference; what is far from the local mass counts as not quite so far.
    A weight that lies between two whole numbers may become either."""
    rng = np.random.default_rng(seed)
    level, width = rng.standard_normal(head_dim), rng.lognormal(size=head_dim)
    keys = (rng.standard_normal((64, head_dim)) * width + level).astype(np.float32)
    q = (spread / head_dim**0.5 * rng.standard_normal((n, head_dim))).astype(np.float32)
    page = sketch(keys.astype(np.float16)[None], bits)
    scores = estimated_scores(q, page, 1.0)
    local_mass = scores.max(axis=1).astype(np.float32) + rng.uniform(-5, 20, n).astype(np.float32)
    above = np.clip(scores - local_mass[:, None], -120 * np.log(2), 100 * np.log(2))
    expected = np.log(np.exp(above).reshape(n, 4, 16).sum(axis=2))
    _, unit = rounded_weights(q * page.step)
    whole = np.divide(q * page.step, unit, where=unit > 0, out=np.zeros_like(q))
    flips = (np.abs(np.abs(whole - np.rint(whole)) - 0.5) < 1e-4).sum(axis=1, keepdims=True)
    summed = np.abs(q) @ (np.abs(page.lo[0]) + page.step[0] * page.codes.max())
    tolerance = 2e-4 + 3e-7 * summed[:, None] + flips * unit * page.codes.max()
    assert (np.abs(np.log(sketch_sums(isa, bits, keys, q, local_mass)) - expected) <= tolerance).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [2, 3, 4, GRADED])
def test_largest_codes_with_largest_weights_fit(isa: str, bits: PageBits) -> None:
    """Every key has its channel's highest or lowest code, every weight is 127: no sum may wrap."""
    keys = np.repeat(np.arange(64) % 2, 512).reshape(64, 512)
    q = np.full((3, 512), 1 / 64, np.float32)
    sums = sketch_sums(isa, bits, keys, q, np.zeros(3))
    codes = sketch(keys.astype(np.float16)[None], bits)
    expected = np.exp(estimated_scores(q, codes, 1.0)).reshape(3, 4, 16).sum(axis=2)
    np.testing.assert_allclose(sums, expected, rtol=2e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [2, 3, 4, GRADED])
def test_sums_are_finite_or_nan(isa: str, bits: PageBits) -> None:
    """NaN of a query stays; what no float holds becomes the bounds."""
    keys = np.random.default_rng(0).standard_normal((64, 64))
    q = np.zeros((4, 64), np.float32)
    q[1, 5], q[2], q[3] = np.nan, 1e30, -1e30
    sums = sketch_sums(isa, bits, keys, q, np.array([-1e30, 0, 0, 0]))
    assert np.isnan(sums).tolist() == [[False] * 4, [True] * 4, [False] * 4, [False] * 4]
    np.testing.assert_allclose(sums[0], 16 * 2.0**100, rtol=2e-4)
    assert np.isfinite(sums[[0, 2, 3]]).all()


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, shape=shapes, bits=st.sampled_from([2, 3, 4, GRADED]), n=st.integers(200, 600))
def test_reading_everything_is_dense(seed: int, shape: tuple[int, int, int], bits: PageBits, n: int) -> None:
    x = random_inputs(seed, n, *shape)
    dense = run(x, Policy("dense", n_window=64))
    policy = with_arrays(Policy("dense", n_window=64), shape, seed)
    every = run(x, replace(policy, page_bits=bits, page_share=0.0))
    # Only pages whose estimated share underflows to 0 are left out.
    assert np.allclose(dense.output, every.output, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, shape=shapes, policy=paged, n=st.integers(200, 500), n_threads=st.integers(2, 4))
def test_threads_change_nothing(
    seed: int, shape: tuple[int, int, int], policy: Policy, n: int, n_threads: int
) -> None:
    x = random_inputs(seed, n, *shape)
    policy = with_arrays(policy, shape, seed)
    for chunk in (1, n):
        one, many = (run(x, policy, n_threads=threads, chunk=chunk) for threads in (1, n_threads))
        assert np.array_equal(one.output, many.output)
        assert one.stats == many.stats


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, shape=shapes)
def test_each_share_is_for_its_tiles(seed: int, shape: tuple[int, int, int]) -> None:
    """Queries one by one are cut at decode_share, tiles of many at page_share."""
    x = random_inputs(seed, 300, *shape)
    policy = Policy("dense", n_window=64, page_bits=3, page_share=1.0, decode_share=0.001)
    alone = run(x, policy, chunk=1)
    assert alone.stats == run(x, replace(policy, page_share=0.001, decode_share=None), chunk=1).stats
    together = run(x, policy)
    # No tile has one query: batches and pages begin and end elsewhere.
    assert together.stats == run(x, replace(policy, decode_share=0.2)).stats
    assert together.stats["pages_read"] < run(x, replace(policy, page_share=0.001)).stats["pages_read"]


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, shape=shapes)
def test_a_larger_share_reads_less(seed: int, shape: tuple[int, int, int]) -> None:
    x = random_inputs(seed, 500, *shape)
    policy = Policy("dense", n_window=64, page_bits=3)
    cuts = (0.0, 0.002, 0.02, 0.2, 1.0)
    read = [run(x, replace(policy, page_share=share)).stats["pages_read"] for share in cuts]
    assert read == sorted(read, reverse=True)
    assert read[-1] == 0
