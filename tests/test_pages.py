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
from pyllm.reference.sketch import GRADED, PageBits
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


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, local_mass=st.floats(-40, 40), spread=st.sampled_from([0.1, 5.0, 60.0]))
def test_sums_of_strips(isa: str, seed: int, local_mass: float, spread: float) -> None:
    """To four digits; what is far from the local mass counts as not quite so far; NaN stays."""
    rng = np.random.default_rng(seed)
    scores = (local_mass + spread * rng.standard_normal((6, 16))).astype(np.float32)
    scores[4, 3], scores[5, 8] = np.nan, rng.choice([-1e30, 1e30])
    sums, err = np.full(6, np.nan, np.float32), ffi.new("pyllm_error *")
    arrays = ffi.from_buffer("float[]", scores), ffi.from_buffer("float[]", sums)
    check(lib.hook_strip_sums(isa.encode(), arrays[0], 6, local_mass, arrays[1], err), err)
    above = np.clip(scores.astype(np.float64) - np.float32(local_mass), -120 * np.log(2), 100 * np.log(2))
    np.testing.assert_allclose(sums, np.exp(above).sum(axis=1), rtol=2e-4)
    assert np.isnan(sums).tolist() == [False] * 4 + [True, False]


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
