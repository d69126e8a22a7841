"""What stands for what a token evaluated alone leaves out, on the CPU and on emulated GPU kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyllm.reference import attention as reference
from pyllm.reference import sketch
from pyllm.reference.attention import Policy
from pyllm.reference.kv_cache import stored_keys
from pyllm.reference.sketch import GRADED
from test_attention import FIELDS, SEEDS, WEIGHT_ROUNDING, Inputs, random_inputs, run, with_arrays
from test_linear import ISAS, products

# Groups that fill the CPU's three rows or not, the GPU's eight or not, with a warp per row or without.
shapes = st.sampled_from(
    [(1, 1, 32), (6, 2, 64), (7, 1, 32), (18, 1, 32), (33, 1, 32), (4, 4, 128), (4, 2, 80)]
)
resting = st.builds(
    Policy,
    kind=st.sampled_from(["dense", "static"]),
    n_sink=st.sampled_from([0, 16]),
    n_window=st.sampled_from([1, 64, 100]),
    static_local=st.just(True),
    page_bits=st.just(GRADED),
    decode_share=st.sampled_from([0.01, 0.1, 1.0]),
)


def with_rest(policy: Policy, shape: tuple[int, int, int], seed: int, factor: float = 0.7) -> Policy:
    return replace(with_arrays(policy, shape, seed), page_rest=factor)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=12, deadline=None)
@given(
    seed=SEEDS,
    shape=shapes,
    policy=resting,
    n=st.sampled_from([130, 700]),
    factor=st.sampled_from([0.3, 1.0]),
)
def test_reference(
    isa: str, seed: int, shape: tuple[int, int, int], policy: Policy, n: int, factor: float
) -> None:
    check_last(random_inputs(seed, n, *shape), with_rest(policy, shape, seed, factor), isa, "cpu")


@settings(max_examples=5, deadline=None)
@given(seed=SEEDS, shape=shapes, policy=resting, n=st.sampled_from([130, 400]))
def test_reference_of_a_gpu(seed: int, shape: tuple[int, int, int], policy: Policy, n: int) -> None:
    check_last(random_inputs(seed, n, *shape), with_rest(policy, shape, seed), ISAS[-1], "cuda")


@pytest.mark.parametrize(("device", "n"), [("cpu", 4400), ("cuda", 2300)])  # 64 pages, and 32
@settings(max_examples=2, deadline=None)
@given(seed=SEEDS)
def test_more_pages_than_are_summed_at_once(device: str, n: int, seed: int) -> None:
    shape = 2, 1, 32
    policy = Policy("dense", n_window=64, page_bits=GRADED, decode_share=0.05)
    check_last(random_inputs(seed, n, *shape), with_rest(policy, shape, seed), ISAS[-1], device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("sharpness", [300.0, 3000.0])
def test_far_more_in_the_bulk_than_nearby(device: str, sharpness: float) -> None:
    """Weights beside the local mass's 1 that no float holds: still a number, whatever it says."""
    shape = 6, 2, 64
    x = random_inputs(3, 400, *shape)
    x = Inputs(x.q * np.float32(sharpness), x.k, x.v)
    policy = with_rest(Policy("dense", n_window=1, n_sink=0, page_bits=GRADED, decode_share=1.0), shape, 3)
    assert np.isfinite(run(x, policy, chunk=399, device=device).output).all()


def check_last(x: Inputs, policy: Policy, isa: str, device: str) -> None:
    """The last token, alone behind a prompt.

    Not where a share is so near the cut that rounding flips it, nor where the bulk's scores are over the
    local mass by as much as the library bounds them to.
    """
    kind = products(isa) if device == "cpu" else "float"
    theirs = reference.attend(x.q[-1:], x.k, x.v, x.scale, policy, products=kind)
    shares, most_above = estimates(x, policy, theirs)
    assume(not (np.abs(shares / policy.cut(1) - 1) < 1e-3).any())
    assume(most_above < 60)
    ours = run(x, policy, isa, chunk=len(x.q) - 1, device=device)
    assert np.array_equal(ours.is_long[-1], ~theirs.decisions.local[0])
    rounding = WEIGHT_ROUNDING[kind] if device == "cpu" else 6e-4
    # Estimated weights have four digits, and the values that stand for pages are halves.
    tolerance = 2e-5 * (1 + np.abs(theirs.decisions.local_mass).max()) + 2e-4 + 2.0**-11 + rounding
    np.testing.assert_allclose(ours.output[-1], theirs.output[0], atol=tolerance * np.abs(x.v).max(), rtol=0)


def estimates(
    x: Inputs, policy: Policy, result: reference.AttentionResult
) -> tuple[NDArray[np.float64], float]:
    """Of the last token's long heads: (n, read pages) shares of all attention, and by how much a score is
    over the local mass at most."""
    sketches = reference.sketch_bulk(stored_keys(x.k).transpose(1, 0, 2), policy, 0)
    group = x.q.shape[1] // len(sketches)
    shares, above = [np.zeros((0, sketches[0].codes.shape[0] * 4))], [0.0]
    for h in np.flatnonzero(~result.decisions.local[0]):
        scores = sketch.estimated_scores(x.q[-1:, h], sketches[h // group], x.scale)
        mass = result.decisions.local_mass[:1, h]
        shares.append(sketch.shares(scores, mass))
        above.append(float((scores - mass).max()))
    return np.concatenate(shares), max(above)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS, shape=shapes)
def test_is_of_tokens_evaluated_alone(device: str, seed: int, shape: tuple[int, int, int]) -> None:
    """It changes their outputs, and neither those of others, nor what is read and recorded of it."""
    x = random_inputs(seed, 400, *shape)
    nothing = with_rest(Policy("dense", n_window=64, page_bits=GRADED, decode_share=1.0), shape, seed, 0)
    without, beside = (
        run(x, replace(nothing, page_rest=factor), chunk=399, device=device) for factor in (0.0, 0.7)
    )
    assert np.array_equal(without.output[:-1], beside.output[:-1])
    assert (np.abs(without.output[-1] - beside.output[-1]).max(axis=1) > 0).all()
    assert np.array_equal(without.record["read_mass"], beside.record["read_mass"])
    n_heads, n_kv_heads, d = shape
    pages = (400 - 64 - nothing.n_sink) // reference.PAGE
    work = n_heads * pages * d
    more = {"work_done": work, "work_sketch": work, "bytes_read": n_kv_heads * pages * 2 * d}
    assert {name: beside.stats[name] - without.stats[name] for name in FIELDS} == {
        name: more.get(name, 0) for name in FIELDS
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS, shape=shapes)
def test_stands_for_nothing_where_all_is_read(device: str, seed: int, shape: tuple[int, int, int]) -> None:
    x = random_inputs(seed, 300, *shape)
    every = with_rest(Policy("dense", n_window=64, page_bits=GRADED, page_share=0.0), shape, seed, 0)
    one, other = (run(x, replace(every, page_rest=f), chunk=299, device=device).output for f in (0.0, 0.7))
    assert np.array_equal(one, other)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_comes_closer_to_dense_attention(device: str) -> None:
    """Where values agree inside a page, whatever stands for them is nearly what they are."""
    shape = 6, 2, 64
    x = random_inputs(5, 1500, *shape)
    of_page = np.random.default_rng(5).standard_normal((24, 2, 64)).repeat(64, axis=0)[:1500]
    v = of_page + 0.05 * x.v  # pages begin behind the sinks: 16 tokens early
    x = Inputs(x.q, x.k, np.ascontiguousarray(np.roll(v, 16, axis=0), np.float32))
    policy = with_rest(Policy("dense", n_window=64, page_bits=GRADED, decode_share=0.01), shape, 5, 1.0)
    dense = run(x, Policy("dense", n_window=64), chunk=1499, device=device).output[-1]
    with_it, without = (
        run(x, replace(policy, page_rest=f), chunk=1499, device=device).output[-1] for f in (1.0, 0.0)
    )
    assert np.abs(with_it - dense).mean() < 0.5 * np.abs(without - dense).mean()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_stands_for_pages_where_too_many_heads_share_keys(device: str) -> None:
    """Of a group of more than 64, whose heads have lists of their own in decode too."""
    shape = 65, 1, 32
    x = random_inputs(7, 200, *shape)
    policy = with_rest(Policy("dense", n_window=64, page_bits=GRADED, decode_share=1.0), shape, 7)
    with_it, without = (run(x, replace(policy, page_rest=f), chunk=199, device=device) for f in (0.7, 0.0))
    assert np.array_equal(with_it.output, without.output)
    assert with_it.stats == without.stats
