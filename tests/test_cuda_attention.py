"""The attention kernels for GPUs, emulated, against the numpy reference and themselves.

Weights are one half each (attend.cu), so outputs differ from the reference's by up to 2^-11 of the
largest value.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyllm.reference import attention as reference
from pyllm.reference.attention import Policy
from pyllm.reference.sketch import GRADED, PageBits
from test_attention import (
    FIELDS,
    POLICY_NUMBER,
    SEEDS,
    Inputs,
    Result,
    assert_same,
    assert_shows_at_once,
    near_ties,
    random_inputs,
    with_arrays,
)
from test_attention import run as run_on
from test_estimates import assert_estimates, calibrated, forms, kinds
from test_linear import ISAS
from test_record import assert_record, audits

# Groups of decode fill a panel of 8 rows or not, have a warp per row up to 32; lists are counted by 32.
SHAPES = [
    (4, 2, 64), (6, 2, 80), (3, 1, 96), (7, 1, 32), (18, 1, 32), (33, 1, 32), (33, 33, 32),
    (2, 1, 128), (2, 2, 256),
]  # fmt: skip
shapes = st.sampled_from(SHAPES)
policies = st.builds(
    Policy,
    kind=st.sampled_from(list(POLICY_NUMBER)),
    n_sink=st.sampled_from([0, 1, 16, 17, 64]),
    n_window=st.sampled_from([1, 63, 64, 65, 100]),
    granularity=st.sampled_from(["head", "group"]),
    thresholds=st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.1]),
    static_local=st.just(True),
)
paged = st.builds(
    Policy,
    kind=st.sampled_from(["dense", "static", "adaptive"]),
    n_sink=st.sampled_from([0, 16, 64]),
    n_window=st.sampled_from([1, 64, 100]),
    granularity=st.sampled_from(["head", "group"]),
    thresholds=st.sampled_from([0.5, 0.9]),
    static_local=st.just(True),
    page_bits=st.sampled_from([2, 3, 4, GRADED]),
    page_share=st.sampled_from([0.001, 0.01, 0.1, 0.5]),
    decode_share=st.sampled_from([None, 0.002, 0.2]),
    page_drop=st.sampled_from([1.0, 0.3]),
)
# In how many queries a prompt is cut: 0 stands for all but the last, prefill and one step of decode.
chunks = st.sampled_from([0, 1, 7, 64, 512])


def run(
    x: Inputs,
    policy: Policy,
    chunk: int = 512,
    audit: NDArray[np.bool_] | None = None,
    kv_window: int = 0,
) -> Result:
    """chunk: 0 stands for all but the last query, and that one."""
    n = len(x.q)
    chunk = min(chunk or max(n - 1, 1), n)
    return run_on(x, policy, chunk=chunk, audit=audit, device="cuda", kv_window=kv_window)


def some_inputs(seed: int, n: int, chunk: int, shape: tuple[int, int, int]) -> Inputs:
    """Fewer where every token is a batch: the emulator is slow."""
    return random_inputs(seed, min(n, 170) if chunk in (1, 7) else n, *shape)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, shape=shapes, policy=policies, n=st.integers(1, 330), chunk=chunks)
def test_reference(seed: int, shape: tuple[int, int, int], policy: Policy, n: int, chunk: int) -> None:
    x = some_inputs(seed, n, chunk, shape)
    policy = with_arrays(policy, shape, seed)
    ours = run(x, policy, chunk)
    theirs = reference.attend(x.q, x.k, x.v, x.scale, policy)
    decisions = theirs.decisions
    tolerance = 2e-5 * (1 + np.abs(decisions.local_mass).max())
    assert np.allclose(ours.local_mass, decisions.local_mass, atol=tolerance, rtol=0)
    bulk = decisions.has_bulk
    near = np.zeros_like(decisions.local)
    mass = {"oracle": decisions.bulk_mass_true, "adaptive": decisions.bulk_mass_estimate}.get(policy.kind)
    if mass is not None:
        scale = 1 + np.abs(mass[bulk]).max(initial=0)
        assert np.allclose(ours.bulk_mass[bulk], mass[bulk], atol=2e-5 * scale, rtol=0)
        near = near_ties(decisions.local_mass, mass, policy, 1e-3 + 4e-5 * scale)
        if policy.granularity == "group":
            near = np.repeat(near.reshape(len(near), shape[1], -1).any(2), shape[0] // shape[1], 1)
    different = ours.is_long != (~decisions.local & bulk[:, None])
    assert not (different & ~near).any()
    same = ~different
    error = (6e-4 + tolerance) * np.abs(x.v).max()
    assert np.allclose(ours.output[same], theirs.output[same], atol=error, rtol=0)
    if not different.any():
        assert ours.stats == {name: getattr(theirs.stats, name) for name in FIELDS}


@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, shape=shapes, policy=policies, n=st.integers(130, 280))
def test_chunks_change_nothing(seed: int, shape: tuple[int, int, int], policy: Policy, n: int) -> None:
    x = random_inputs(seed, n, *shape)
    policy = with_arrays(policy, shape, seed)
    whole = run(x, policy)
    for chunk in (0, 64, 100):
        assert_same(whole, run(x, policy, chunk))
    short = replace(x, q=x.q[:150].copy(), k=x.k[:150].copy(), v=x.v[:150].copy())
    whole = run(short, policy)
    for chunk in (1, 7):
        assert_same(whole, run(short, policy, chunk))


@settings(max_examples=5, deadline=None)
@given(seed=SEEDS, shape=shapes, policy=policies, n=st.integers(1, 300), chunk=st.sampled_from([0, 64]))
def test_threshold_above_one_is_dense(
    seed: int, shape: tuple[int, int, int], policy: Policy, n: int, chunk: int
) -> None:
    x = random_inputs(seed, n, *shape)
    dense = run(x, replace(policy, kind="dense", static_local=None), chunk)
    for kind in ("oracle", "adaptive"):
        assert_same(dense, run(x, replace(policy, kind=kind, thresholds=1.01), chunk))


@settings(max_examples=5, deadline=None)
@given(seed=SEEDS, shape=shapes, policy=policies, n=st.integers(1, 150))
def test_nothing_in_the_bulk_is_dense(seed: int, shape: tuple[int, int, int], policy: Policy, n: int) -> None:
    x = random_inputs(seed, n, *shape)
    policy = replace(with_arrays(policy, shape, seed), n_window=n)
    result = run(x, policy)
    assert_same(run(x, replace(policy, kind="dense")), result)
    assert result.stats == dict.fromkeys(FIELDS, 0)


@pytest.mark.parametrize("chunk", [0, 512])
def test_nan_never_passes(chunk: int) -> None:
    """A query that is not a number makes its heads long and its output NaN, and no other's."""
    x = random_inputs(5, 200, 4, 2, 64)
    policy = Policy("adaptive", n_window=64, thresholds=0.0)
    clean = run(x, policy, chunk)
    q = x.q.copy()
    q[199, 2, 7] = np.nan
    result = run(replace(x, q=q), policy, chunk)
    assert np.isnan(result.output[199, 2]).all()
    assert result.is_long[199].tolist() == [False, False, True, False]
    others = np.ones((200, 4), bool)
    others[199, 2] = False
    assert np.array_equal(result.output[others], clean.output[others])


def test_a_key_past_halves_shows_at_once() -> None:
    assert_shows_at_once("cuda", ISAS[-1], 64)


@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, shape=shapes, policy=paged, n=st.integers(100, 330), chunk=chunks)
def test_pages_against_the_reference(
    seed: int, shape: tuple[int, int, int], policy: Policy, n: int, chunk: int
) -> None:
    """A share that hangs on rounding flips a read page, so a few rows may differ, and the counts a little."""
    x = some_inputs(seed, n, chunk, shape)
    policy = with_arrays(policy, shape, seed)
    ours = run(x, policy, chunk)
    theirs = reference.attend(x.q, x.k, x.v, x.scale, policy, chunk=chunk or len(x.q) - 1)
    error = np.abs(ours.output - theirs.output).max(2)
    tolerance = (6e-4 + 2e-5 * (1 + np.abs(theirs.decisions.local_mass).max())) * np.abs(x.v).max()
    assert (error > tolerance).mean() <= 0.02
    for name in FIELDS:
        count = getattr(theirs.stats, name)
        slack = 0.02 * count + 64 * shape[0] * reference.PAGE * 4 * shape[2]
        assert abs(ours.stats[name] - count) <= slack, name


@settings(max_examples=4, deadline=None)
@given(seed=SEEDS, shape=shapes, bits=st.sampled_from([2, 3, 4, GRADED]), chunk=st.sampled_from([0, 512]))
def test_larger_shares_read_less_and_none_reads_everything(
    seed: int, shape: tuple[int, int, int], bits: PageBits, chunk: int
) -> None:
    x = random_inputs(seed, 230, *shape)
    policy = replace(with_arrays(Policy("dense", n_window=64), shape, seed), page_bits=bits)
    results = [run(x, replace(policy, page_share=share), chunk) for share in (0.0, 0.02, 1.0)]
    read = [result.stats["pages_read"] for result in results]
    assert read == sorted(read, reverse=True)
    assert read[-1] == 0
    # Only pages whose estimated share underflows to 0 are left out.
    assert np.allclose(run(x, Policy("dense", n_window=64), chunk).output, results[0].output, atol=2e-3)


@settings(max_examples=10, deadline=None)
@given(
    seed=SEEDS,
    shape=shapes,
    form=forms,
    kind=kinds,
    from_other_text=st.booleans(),
    granularity=st.sampled_from(["head", "group"]),
    threshold=st.sampled_from([0.3, 0.6, 0.9]),
    n=st.integers(100, 330),
    chunk=chunks,
)
def test_every_form_of_the_estimate(
    seed: int,
    shape: tuple[int, int, int],
    form: str,
    kind: str,
    from_other_text: bool,
    granularity: str,
    threshold: float,
    n: int,
    chunk: int,
) -> None:
    x = some_inputs(seed, n, chunk, shape)
    policy = Policy(
        "adaptive",
        n_window=64,
        granularity=granularity,
        thresholds=threshold,
        gaussian=form,
        estimate=kind,
        coefficients=np.random.default_rng(seed).uniform(-1, 1, (1, shape[0], 3)).astype(np.float32),
        **(calibrated(seed, shape) if from_other_text else {}),
    )
    theirs = reference.attend(x.q, x.k, x.v, x.scale, policy).decisions
    assert_estimates(run(x, policy, chunk), theirs, policy, shape[1])


def test_unknown_estimates_are_never_local(rng: np.random.Generator) -> None:
    """At a threshold of 0 everything is local, but for what nobody can tell."""
    x = random_inputs(int(rng.integers(2**32)), 200, 4, 2, 32)
    policy = Policy(
        "adaptive",
        n_window=64,
        thresholds=0.0,
        estimate="maximum",
        coefficients=np.zeros((1, 4, 3), np.float32),
        means=(rng.choice([-1.0, 1.0], (1, 2, 32)) * 3e38).astype(np.float32),
        covariances=np.broadcast_to(np.eye(32, dtype=np.float32) * 3e38, (1, 2, 32, 32)).copy(),
    )
    result = run(x, policy)
    unknown = np.isnan(result.record["estimate"])
    unknown[: 16 + 64 + 63] = False  # no bulk
    assert unknown.any()
    assert np.array_equal(result.is_long, unknown)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, shape=shapes, policy=policies | paged, n=st.integers(1, 300), chunk=chunks)
def test_records(seed: int, shape: tuple[int, int, int], policy: Policy, n: int, chunk: int) -> None:
    x = some_inputs(seed, n, chunk, shape)
    policy, audit = with_arrays(policy, shape, seed), audits(seed, len(x.q))
    ours = run(x, policy, chunk, audit)
    theirs = reference.attend(x.q, x.k, x.v, x.scale, policy).decisions
    assert_record(ours, theirs, policy, audit)
    assert_same(ours, run(x, policy, chunk))


@settings(max_examples=8, deadline=None)
@given(
    seed=SEEDS,
    shape=shapes,
    policy=policies | paged,
    n=st.integers(200, 420),
    chunk=st.sampled_from([0, 7, 64, 100]),
    kv_window=st.sampled_from([1, 64, 200]),
)
def test_a_split_cache_changes_nothing(
    seed: int, shape: tuple[int, int, int], policy: Policy, n: int, chunk: int, kv_window: int
) -> None:
    """Whatever its window is beside the policy's: what the GPU does not hold it reads from the host."""
    x = random_inputs(seed, min(n, 260) if chunk == 7 else n, *shape)
    policy = with_arrays(policy, shape, seed)
    assert_same(run(x, policy, chunk), run(x, policy, chunk, kv_window=kv_window))
