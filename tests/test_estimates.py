"""Every form of the bulk mass's estimate: native against numpy, at extremes, and never local by NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from native import lib
from pyllm.reference import attention as reference
from pyllm.reference import moments
from test_attention import SEEDS, Result, assert_same, random_inputs, run, shapes
from test_linear import ISAS, floats, products

forms = st.sampled_from(moments.FORMS)
kinds = st.sampled_from(moments.ESTIMATES)
sizes = st.integers(1, 2**20).map(lambda pages: 64 * pages) | st.just(64)
sigmas = st.just(0.0) | st.floats(0, 10, width=32) | st.floats(0, 2.0**40, width=32)


def estimate(
    form: str, kind: str, b: NDArray[np.float32], n_keys: int, mean: Any, variance: Any
) -> NDArray[np.float32]:
    mean, variance = (np.atleast_1d(x).astype(np.float32) for x in (mean, variance))
    out: NDArray[np.float32] = np.zeros_like(mean)
    lib.hook_bulk_estimate(
        moments.FORMS.index(form), moments.ESTIMATES.index(kind), floats(b), n_keys, floats(mean),
        floats(variance), len(mean), floats(out),
    )  # fmt: skip
    return out


@given(
    form=forms,
    kind=kinds,
    n_keys=sizes,
    sigma=sigmas,
    mean=st.floats(-1000, 1000, width=32),
    b=st.tuples(*[st.floats(-8, 8, width=32)] * 3),
)
def test_reference(form: str, kind: str, n_keys: int, sigma: float, mean: float, b: Any) -> None:
    variance = float(np.float32(sigma) ** 2)
    coefficients = np.array(b, np.float32)
    ours = estimate(form, kind, coefficients, n_keys, mean, variance)[0]
    theirs = moments.estimated_mass(
        np.array([mean], np.float64),
        np.array([variance], np.float64),
        n_keys,
        form,
        kind,
        coefficients.astype(np.float64),
    )[0]
    # Terms of the size of variance and mean are added in float32; "truncated" cancels none of them.
    size = 30 + abs(mean) + (abs(b[1]) * variance + abs(b[2]) * sigma if kind != "gaussian" else 0)
    size += variance if form == "lognormal" else sigma * np.sqrt(2 * np.log(n_keys))
    # The reference's own truncated form takes variance from variance, in float64.
    noise = 1e-15 * variance if form == "truncated" else 0
    assert abs(ours - theirs) <= 2e-6 * size + noise


@given(sigmas, sizes)
def test_finite_forms_stay_below_the_papers(sigma: float, n_keys: int) -> None:
    variance = float(np.float32(sigma) ** 2)
    paper, frozen, truncated = (
        float(estimate(form, "gaussian", np.zeros(3, np.float32), n_keys, 0, variance)[0])
        for form in moments.FORMS
    )
    slack = 1e-5 * (30 + paper)
    assert frozen <= paper + slack
    assert truncated <= paper + slack
    # N keys cannot weigh more than N of the heaviest one expected, nor less than that one does alone.
    edge = np.sqrt(2 * np.log(n_keys))
    assert sigma * edge - slack <= frozen <= sigma * edge + np.log(n_keys) + slack
    assert truncated <= sigma * edge + np.log(n_keys) + slack


@pytest.mark.parametrize("form", moments.FORMS)
@pytest.mark.parametrize("kind", moments.ESTIMATES)
def test_not_a_number_stays_none(form: str, kind: str) -> None:
    b = np.array([0.5, 0.1, 0.2], np.float32)
    mean = [np.nan, 0.0, np.nan, -np.inf]
    variance = [1.0, np.nan, np.nan, np.inf]
    found = estimate(form, kind, b, 640, mean, variance)
    assert np.isnan(found).all()
    assert np.isnan(estimate(form, kind, np.full(3, np.nan, np.float32), 640, 1.0, 1.0)[0]) == (
        kind != "gaussian"
    )


def calibrated(seed: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Arrays of one layer."""
    _, n_kv_heads, d = shape
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((1, n_kv_heads, d, d)) / np.sqrt(d)
    return {
        "means": rng.standard_normal((1, n_kv_heads, d)).astype(np.float32),
        "covariances": (root @ root.swapaxes(-1, -2)).astype(np.float32),
    }


def assert_estimates(
    ours: Result, theirs: reference.Decisions, policy: reference.Policy, n_kv_heads: int
) -> None:
    """Estimates are numpy's, and decisions follow from them."""
    n, threshold = len(ours.is_long), float(np.asarray(policy.thresholds))
    bulk = theirs.has_bulk
    for name, expected in (("mean_score", theirs.mean_score), ("deviation", theirs.deviation)):
        scale = 1 + np.abs(expected[bulk]).max(initial=0)
        assert np.allclose(ours.record[name][bulk], expected[bulk], atol=2e-5 * scale, rtol=1e-4)
        assert np.isnan(ours.record[name][~bulk]).all()
    scale = 1 + np.abs(theirs.mean_score[bulk]).max(initial=0) + (theirs.deviation[bulk] ** 2).max(initial=0)
    found = ours.record["estimate"]
    assert np.allclose(found[bulk], theirs.bulk_mass_estimate[bulk], atol=5e-5 * scale, rtol=0)
    with np.errstate(over="ignore"):
        share = 1 / (1 + np.exp(found - ours.local_mass))
    is_long = (share < np.float32(threshold)) & bulk[:, None]
    unsure = (np.abs(share - threshold) < 1e-5).reshape(n, n_kv_heads, -1)
    groups = is_long.reshape(n, n_kv_heads, -1)
    if policy.granularity == "group":
        groups = np.broadcast_to(groups.any(2, keepdims=True), groups.shape)
        unsure = np.broadcast_to(unsure.any(2, keepdims=True), unsure.shape)
    sure = ~unsure.reshape(n, -1)
    assert np.array_equal(ours.is_long[sure], groups.reshape(n, -1)[sure])


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=12, deadline=None)
@given(
    seed=SEEDS,
    shape=shapes,
    form=forms,
    kind=kinds,
    from_other_text=st.booleans(),
    granularity=st.sampled_from(["head", "group"]),
    threshold=st.sampled_from([0.3, 0.6, 0.9]),
    n=st.integers(100, 400),
    chunk=st.sampled_from([1, 7, 64, 512]),
)
def test_attention(
    isa: str,
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
    n = n if chunk > 1 else min(n, 200)
    x = random_inputs(seed, n, *shape)
    b = np.random.default_rng(seed + 1).uniform(-1, 1, (1, shape[0], 3)).astype(np.float32)
    policy = reference.Policy(
        "adaptive",
        n_window=64,
        granularity=granularity,
        thresholds=threshold,
        gaussian=form,
        estimate=kind,
        coefficients=b,
        **(calibrated(seed, shape) if from_other_text else {}),
    )
    audit = np.zeros(n, bool)
    ours = run(x, policy, isa, chunk=min(chunk, n), audit=audit)
    theirs = reference.attend(x.q, x.k, x.v, x.scale, policy, chunk=chunk, products=products(isa)).decisions
    assert_estimates(ours, theirs, policy, shape[1])
    assert_same(ours, run(x, policy, isa, 2, n, audit))


def test_not_a_number_is_never_local(rng: np.random.Generator) -> None:
    """At a threshold of 0 everything is local, but for what nobody can tell."""
    x = random_inputs(int(rng.integers(2**32)), 400, 4, 2, 32)
    b = np.zeros((1, 4, 3), np.float32)
    signs = rng.choice([-1.0, 1.0], (1, 2, 32))
    for kind in moments.ESTIMATES:
        policy = reference.Policy(
            "adaptive",
            n_window=64,
            thresholds=0.0,
            estimate=kind,
            coefficients=b,
            means=(signs * 3e38).astype(np.float32),
            covariances=np.broadcast_to(np.eye(32, dtype=np.float32) * 3e38, (1, 2, 32, 32)).copy(),
        )
        result = run(x, policy, audit=np.zeros(400, bool))
        unknown = np.isnan(result.record["estimate"])
        unknown[: 16 + 64 + 63] = False  # no bulk
        assert unknown.any()
        assert np.array_equal(result.is_long, unknown)
