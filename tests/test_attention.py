"""The attention pipeline on given queries, keys and values, against the numpy reference and itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from emulated import ffi, lib
from native import check
from pyllm.reference import attention as reference
from pyllm.reference import moments
from pyllm.reference.attention import Policy
from pyllm.reference.kv_cache import KEY_GROUP, KV_TYPES
from pyllm.reference.sketch import GRADED
from test_linear import ISAS, products

SEEDS = st.integers(0, 2**32 - 1)
POLICY_NUMBER = {"dense": 0, "window": 1, "static": 2, "oracle": 3, "adaptive": 4}
# Each weight of a sum of values is off by at most this part of itself.
WEIGHT_ROUNDING = {"float": 0.0, "bfloat16": 2.0**-8}
FIELDS = (
    "pairs",
    "pairs_local",
    "work",
    "work_done",
    "bytes",
    "bytes_read",
    "pages",
    "pages_read",
    "work_sketch",
)


@dataclass(frozen=True)
class Inputs:
    """q: (T, H, d); k, v: (T, G, d), float32."""

    q: NDArray[np.float32]
    k: NDArray[np.float32]
    v: NDArray[np.float32]

    @property
    def scale(self) -> float:
        return float(np.float32(1 / np.sqrt(self.q.shape[2])))


@dataclass(frozen=True)
class Result:
    output: NDArray[np.float32]
    is_long: NDArray[np.bool_]
    local_mass: NDArray[np.float32]
    bulk_mass: NDArray[np.float32]
    stats: dict[str, int]
    record: dict[str, NDArray[Any]]


def random_inputs(seed: int, n: int, n_heads: int, n_kv_heads: int, head_dim: int) -> Inputs:
    """Keys drift along the text and queries differ in sharpness: some heads are local, others are not."""
    rng = np.random.default_rng(seed)
    drift = np.cumsum(rng.standard_normal((n, n_kv_heads, head_dim)), 0) * 0.15
    k = rng.standard_normal((n, n_kv_heads, head_dim)) + drift
    q = rng.standard_normal((n, n_heads, head_dim)) * rng.uniform(0.1, 3, (1, n_heads, 1))
    v = rng.standard_normal((n, n_kv_heads, head_dim))
    return Inputs(*(np.ascontiguousarray(x, np.float32) for x in (q, k, v)))


def floats(x: NDArray[np.float32]) -> Any:
    assert x.dtype == np.float32
    assert x.flags.c_contiguous
    return ffi.from_buffer("float[]", x)


RECORDED = ("local_mass", "estimate", "true_mass", "read_mass", "mean_score", "deviation")


def run(
    x: Inputs,
    policy: Policy,
    isa: str = ISAS[-1],
    n_threads: int = 1,
    chunk: int = 512,
    audit: NDArray[np.bool_] | None = None,
    device: str = "cpu",
    kv_window: int = 0,
    kv_type: str = "f16",
    finite: bool = True,
) -> Result:
    """audit: (T) bool, whose true masses are recorded. device: "cuda" are the emulated kernels. finite: the
    output is to be, where queries are and keys can be held."""
    n, n_heads, head_dim = x.q.shape
    n_kv_heads = x.k.shape[1]
    thresholds = np.full(n_heads, policy.thresholds, np.float32)
    static = np.broadcast_to(
        np.asarray(policy.static_local if policy.static_local is not None else 0, np.uint8), (n_heads,)
    ).copy()
    shape = ffi.new(
        "hook_attention_shape *",
        (n, n_heads, n_kv_heads, head_dim, policy.n_sink, x.scale, chunk, kv_window, KV_TYPES.index(kv_type)),
    )
    attention = ffi.new("pyllm_attention *")
    attention.policy = POLICY_NUMBER[policy.kind]
    attention.granularity = int(policy.granularity == "group")
    attention.n_window = policy.n_window
    attention.page_bits = lib.PYLLM_GRADED if policy.page_bits == GRADED else policy.page_bits
    attention.page_share, attention.page_drop = policy.page_share, policy.page_drop
    attention.decode_share = policy.cut(1)
    attention.page_rest = policy.page_rest
    if policy.channels is not None:
        attention.channels = ffi.from_buffer("uint16_t[]", policy.channels)
    attention.gaussian = moments.FORMS.index(policy.gaussian)
    attention.estimate = moments.ESTIMATES.index(policy.estimate)
    for name in ("coefficients", "means", "covariances", "query_means"):
        if getattr(policy, name) is not None:
            setattr(attention, name, floats(getattr(policy, name)))
    attention.thresholds = floats(thresholds)
    attention.static_local = ffi.from_buffer("uint8_t[]", static)
    output = np.full_like(x.q, np.nan)
    stats = ffi.new("pyllm_layer_stats *")
    recorded: dict[str, NDArray[Any]] = {name: np.zeros((n, n_heads), np.float32) for name in RECORDED}
    recorded["is_long"] = np.full((n, n_heads), 255, np.uint8)
    arrays = {
        name: ffi.from_buffer("uint8_t[]" if name == "is_long" else "float[]", a)
        for name, a in recorded.items()
    }
    if audit is not None:
        arrays["audit"] = ffi.from_buffer("uint8_t[]", audit)
    record = ffi.new("pyllm_record *", arrays)
    err = ffi.new("pyllm_error *")
    check(
        lib.hook_attention(
            device.encode(), isa.encode(), n_threads, shape, attention, floats(x.q), floats(x.k), floats(x.v),
            floats(output), stats, record, err,
        ),
        err,
    )  # fmt: skip
    is_long = recorded["is_long"]
    assert (is_long <= 1).all()
    held = np.abs(x.k).max() < 65520
    assert np.isfinite(output).all() or not finite or not np.isfinite(x.q).all() or not held
    counts = {name: int(getattr(stats, name)) for name in FIELDS}
    return Result(output, is_long == 1, recorded["local_mass"], recorded["estimate"], counts, recorded)


def assert_same(a: Result, b: Result) -> None:
    """Bit for bit, but for the sign of zero."""
    assert np.array_equal(a.output, b.output)
    assert np.array_equal(a.is_long, b.is_long)
    assert np.array_equal(a.local_mass, b.local_mass)
    assert a.stats == b.stats


shapes = st.sampled_from(
    [(1, 1, 32), (3, 1, 64), (6, 2, 64), (8, 1, 80), (4, 4, 128), (7, 1, 16), (14, 2, 48)]
)
policies = st.builds(
    Policy,
    kind=st.sampled_from(list(POLICY_NUMBER)),
    n_sink=st.sampled_from([0, 1, 16, 63, 64]),
    n_window=st.sampled_from([1, 2, 63, 64, 65, 100, 256]),
    granularity=st.sampled_from(["head", "group"]),
    thresholds=st.sampled_from([0.0, 0.3, 0.6, 0.9, 0.99, 1.1]),
    static_local=st.just(True),
)


def with_arrays(policy: Policy, shape: tuple[int, int, int], seed: int) -> Policy:
    """With static labels, an order of the channels and usual queries; with a rest every other time."""
    rng = np.random.default_rng(seed)
    n_heads, n_kv_heads, head_dim = shape
    order = np.tile(np.arange(head_dim, dtype=np.uint16), (1, n_kv_heads, 1))
    return replace(
        policy,
        static_local=rng.random(n_heads) < 0.5,
        channels=rng.permuted(order, axis=2),
        query_means=rng.standard_normal((1, n_kv_heads, head_dim)).astype(np.float32),
        page_rest=0.7 * (seed % 2) if policy.page_bits == GRADED else 0.0,
    )


of_halves = st.tuples(st.just("f16"), shapes)
of_bytes = st.tuples(st.just("q8_0"), shapes.filter(lambda shape: shape[2] % KEY_GROUP == 0))


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    cache=of_halves | of_bytes,
    policy=policies,
    n=st.integers(1, 700),
    chunk=st.sampled_from([1, 7, 64, 512]),
)
def test_reference(
    isa: str, seed: int, cache: tuple[str, tuple[int, int, int]], policy: Policy, n: int, chunk: int
) -> None:
    kv_type, shape = cache
    arithmetic = products(isa) if kv_type == "f16" else "float"
    x = random_inputs(seed, n if chunk > 1 else min(n, 200), *shape)
    policy = with_arrays(policy, shape, seed)
    ours = run(x, policy, isa, chunk=chunk, kv_type=kv_type)
    theirs = reference.attend(x.q, x.k, x.v, x.scale, policy, products=arithmetic, kv_type=kv_type)
    decisions = theirs.decisions
    # Sharp heads have large scores; float32 rounding of q.k is relative to them.
    rounding = query_rounding(x) if kv_type == "q8_0" else 0.0
    tolerance = 1e-5 * (1 + np.abs(decisions.local_mass).max()) + rounding
    assert np.allclose(ours.local_mass, decisions.local_mass, atol=tolerance, rtol=0)
    bulk = decisions.has_bulk
    mass = {"oracle": decisions.bulk_mass_true, "adaptive": decisions.bulk_mass_estimate}.get(policy.kind)
    if mass is not None:
        scale = 1 + np.abs(mass[bulk]).max(initial=0)
        assert np.allclose(ours.bulk_mass[bulk], mass[bulk], atol=2e-5 * scale + rounding, rtol=0)
        near = near_ties(decisions.local_mass, mass, policy, 1e-3 + 4e-5 * scale + 2 * rounding)
        near = near.reshape(len(near), shape[1], -1)
        near = (
            np.repeat(near.any(2), shape[0] // shape[1], 1)
            if policy.granularity == "group"
            else near.reshape(len(near), -1)
        )
    else:
        near = np.zeros_like(decisions.local)
    different = ours.is_long != (~decisions.local & bulk[:, None])
    assert not (different & ~near).any()
    same = ~different
    spread = np.abs(x.v).max() * (tolerance + WEIGHT_ROUNDING[arithmetic])
    assert np.allclose(ours.output[same], theirs.output[same], atol=spread + 1e-6, rtol=0)
    if not different.any():
        assert ours.stats == {name: getattr(theirs.stats, name) for name in FIELDS}


def query_rounding(x: Inputs) -> float:
    """What rounding queries to words, of at most 32767, may change a score by."""
    return float(x.scale * np.abs(x.q).max() / 65534 * np.abs(x.k).sum(2).max())


def near_ties(local_mass: Any, mass: Any, policy: Policy, margin: float) -> NDArray[np.bool_]:
    """Where the decision is so close that rounding may flip it."""
    tau = float(np.asarray(policy.thresholds, np.float32))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        boundary = np.log(tau / (1 - tau)) if 0 < tau < 1 else np.inf
        near: NDArray[np.bool_] = np.abs(local_mass - mass - boundary) < margin
    return near


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=10, deadline=None)
@given(
    seed=SEEDS,
    cache=of_halves | of_bytes,
    policy=policies,
    n=st.integers(65, 900),
    n_threads=st.integers(2, 4),
)
def test_chunks_and_threads_change_nothing(
    isa: str, seed: int, cache: tuple[str, tuple[int, int, int]], policy: Policy, n: int, n_threads: int
) -> None:
    kv_type, shape = cache
    x = random_inputs(seed, n, *shape)
    policy = with_arrays(policy, shape, seed)
    whole = run(x, policy, isa, chunk=n, kv_type=kv_type)
    for chunk, threads in ((1, n_threads), (7, 1), (64, n_threads), (512, 1), (512, n_threads)):
        assert_same(whole, run(x, policy, isa, threads, min(chunk, n), kv_type=kv_type))


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, shape=shapes, policy=policies, n=st.integers(1, 600))
def test_threshold_above_one_is_dense(seed: int, shape: tuple[int, int, int], policy: Policy, n: int) -> None:
    x = random_inputs(seed, n, *shape)
    dense = run(x, replace(policy, kind="dense", static_local=None))
    for kind in ("oracle", "adaptive"):
        assert_same(dense, run(x, replace(policy, kind=kind, thresholds=1.01)))


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, shape=shapes, policy=policies, n=st.integers(1, 300))
def test_nothing_in_the_bulk_is_dense(seed: int, shape: tuple[int, int, int], policy: Policy, n: int) -> None:
    x = random_inputs(seed, n, *shape)
    policy = replace(with_arrays(policy, shape, seed), n_window=n)
    dense = run(x, replace(policy, kind="dense"))
    result = run(x, policy)
    assert_same(dense, result)
    assert result.stats == dict.fromkeys(FIELDS, 0)


@pytest.mark.parametrize("n_sink", [0, 1, 16, 64])
@pytest.mark.parametrize("n_window", [1, 64, 100])
def test_the_bulk_begins_with_its_first_whole_page(n_sink: int, n_window: int) -> None:
    """One query before, and the query at which the first page has left the window."""
    first = n_sink + n_window + reference.PAGE
    policy = Policy("dense", n_sink=n_sink, n_window=n_window)
    x = random_inputs(3, first, 3, 1, 32)
    before = Inputs(x.q[:-1], x.k[:-1], x.v[:-1])
    assert run(before, policy).stats["pairs"] == 0
    assert run(x, policy).stats["work"] == 3 * reference.PAGE * 2 * x.q.shape[2]


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, shape=shapes, n=st.integers(400, 700))
def test_some_heads_are_long_and_some_are_local(seed: int, shape: tuple[int, int, int], n: int) -> None:
    """Guards the tests above: their inputs really make the rule decide both ways."""
    x = random_inputs(seed, n, *shape)
    policy = Policy("adaptive", n_window=64, thresholds=0.6)
    stats = [run(replace_q(x, sharp), policy).stats for sharp in (0.05, 30.0)]
    assert stats[0]["pairs"] == stats[1]["pairs"] > 0
    assert stats[0]["pairs_local"] + stats[1]["pairs_local"] < 2 * stats[0]["pairs"]


def replace_q(x: Inputs, factor: float) -> Inputs:
    return replace(x, q=np.ascontiguousarray(x.q * np.float32(factor)))


def assert_shows_at_once(device: str, isa: str, head_dim: int) -> None:
    """Of token 150 one key is infinite in halves, which every query of its group takes with a weight of 0."""
    x = random_inputs(6, 200, 4, 2, head_dim)
    q, k = np.abs(x.q), x.k.copy()
    q[:, :, 3] *= -1
    k[150, 1, 3] = 7e4
    x = replace(x, q=q, k=k)
    for policy in (Policy("dense", n_window=64), Policy("window", n_window=64)):
        output = run(x, policy, isa, device=device).output
        assert np.isfinite(output[:150]).all()
        assert np.isfinite(output[:, :2]).all()
        assert np.isnan(output[150, 2:]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", [16, 64])
def test_a_key_past_halves_shows_at_once(isa: str, head_dim: int) -> None:
    assert_shows_at_once("cpu", isa, head_dim)
