"""The page tier of the numpy reference: sketch, estimated scores, wanted read pages, tiles and statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm.reference import attention, sketch
from pyllm.reference.attention import AttentionResult, LayerStats, Policy, attend
from test_reference import Arrays, groupings, random_qkv

seeds = st.integers(0, 2**32 - 1)
bits = st.sampled_from(sketch.BITS)
chunks = st.sampled_from([1, 7, 64, 100, 299, None])
GEOMETRY: dict[str, Any] = {"n_sink": 4, "n_window": 40}
N = 300


def random_pages(seed: int, n_pages: int = 3, head_dim: int = 32) -> np.ndarray:
    """(P, 64, d) of f16: channels differ in level and spread."""
    rng = np.random.default_rng(seed)
    level, spread = rng.normal(size=head_dim) * 3, rng.lognormal(size=head_dim)
    return (rng.normal(size=(n_pages, 64, head_dim)) * spread + level).astype(np.float16)


def decoded(s: sketch.Sketch) -> np.ndarray:
    return s.lo[:, None].astype(np.float64) + s.step[:, None].astype(np.float64) * s.codes


class TestSketch:
    @settings(max_examples=30, deadline=None)
    @given(seeds, bits)
    def test_keys_are_within_half_a_step(self, seed: int, bits: int) -> None:
        pages = random_pages(seed)
        s = sketch.sketch(pages, bits)
        assert s.codes.max() == 2**bits - 1
        np.testing.assert_array_equal(s.lo, pages.min(axis=1))
        # The step is rounded to f16, by up to 2^-11, and the largest code stands for up to 15 of them.
        worst = (0.5 + 15 * 2**-11) * s.step[:, None]
        assert (np.abs(decoded(s) - pages) <= worst).all()

    def test_known_page(self) -> None:
        page = np.zeros((1, 64, 2), np.float16)
        page[0, :5, 0] = [-1, 0, 0.5, 1.5, 2]
        s = sketch.sketch(page, 2)
        assert (s.lo.tolist(), s.step.tolist()) == ([[-1, 0]], [[1, 0]])
        # 0.5 and 1.5 lie between two codes: the even one.
        assert s.codes[0, :6].tolist() == [[0, 0], [1, 0], [2, 0], [2, 0], [3, 0], [1, 0]]

    def test_codes_stay_in_range_where_the_step_rounds_down(self) -> None:
        # (hi - lo) / 15 is 1.46 of the smallest f16 and rounds to 1 of them: hi would be code 22.
        tiny = 2.0**-24
        page = np.zeros((1, 64, 1))
        page[0, :3, 0] = [22 * tiny, 9 * tiny, 16 * tiny]
        s = sketch.sketch(page, 4)
        assert s.step.item() == tiny
        assert s.codes[0, :4, 0].tolist() == [15, 9, 15, 0]

    def test_a_spread_under_the_smallest_step_has_no_codes(self) -> None:
        page = np.zeros((1, 64, 1))
        page[0, 0] = 2.0**-24
        s = sketch.sketch(page, 4)
        assert s.step.item() == 0
        assert not s.codes.any()

    @pytest.mark.parametrize(
        ("head_dim", "bits", "size"),
        [(64, 2, 1280), (64, 3, 1792), (64, 4, 2304), (80, 3, 2368), (16, 3, 576), (128, 2, 2560)],
    )
    def test_size(self, head_dim: int, bits: int, size: int) -> None:
        assert sketch.page_bytes(head_dim, bits) == size

    @pytest.mark.parametrize(
        ("head_dim", "sizes"),
        [
            (64, [16, 16, 32]),
            (128, [32, 32, 64]),
            (16, [16, 0, 0]),
            (32, [16, 16, 0]),
            (48, [16, 16, 16]),
            (80, [32, 32, 16]),
        ],
    )
    def test_grades(self, head_dim: int, sizes: list[int]) -> None:
        assert sketch.grades("graded", head_dim) == list(zip([4, 2, 0], sizes, strict=True))
        n, bits = sizes[0] + sizes[1], 4 * sizes[0] + 2 * sizes[1]
        assert sketch.page_bytes(head_dim, "graded") == 2 * head_dim + 2 * n + 64 * bits // 8

    @settings(max_examples=20, deadline=None)
    @given(seeds)
    def test_a_graded_one_has_each_grade_as_a_sketch_of_as_many_bits(self, seed: int) -> None:
        pages = random_pages(seed, head_dim=64)
        order = np.random.default_rng(seed).permutation(64).astype(np.uint16)
        graded = sketch.sketch(pages, "graded", order)
        for bits, of in ((4, order[:16]), (2, order[16:32])):
            whole = sketch.sketch(pages, bits)
            for name in ("lo", "step", "codes"):
                np.testing.assert_array_equal(getattr(graded, name)[..., of], getattr(whole, name)[..., of])
        rest = order[32:]
        assert not graded.step[:, rest].any()
        np.testing.assert_allclose(
            graded.lo[:, rest], pages.astype(np.float64).mean(axis=1)[:, rest], rtol=2**-10, atol=2**-14
        )


class TestScores:
    @settings(max_examples=30, deadline=None)
    @given(seeds, bits)
    def test_are_those_of_the_decoded_keys(self, seed: int, bits: int) -> None:
        """Up to the rounding of weights: half a unit for each of d codes."""
        s = sketch.sketch(random_pages(seed), bits)
        q = np.random.default_rng(seed).normal(size=(5, 32)).astype(np.float32)
        scores = sketch.estimated_scores(q, s, 0.25).reshape(5, 3, 64)
        expected = np.einsum("nd,pkd->npk", 0.25 * q.astype(np.float64), decoded(s))
        unit = np.abs(0.25 * q[:, None] * s.step).max(axis=2) / 127
        bound = 0.501 * unit[..., None] * s.codes.sum(axis=2, dtype=np.int64) + 1e-5
        assert (np.abs(scores - expected) <= bound).all()

    @settings(max_examples=20, deadline=None)
    @given(seeds)
    def test_more_bits_come_closer_to_the_truth(self, seed: int) -> None:
        pages = random_pages(seed, 8, 64)
        q = np.random.default_rng(seed).normal(size=(8, 64))
        truth = (q @ pages.reshape(-1, 64).astype(np.float64).T) / 8
        errors = [
            np.sqrt(np.mean((sketch.estimated_scores(q, sketch.sketch(pages, b), 0.125) - truth) ** 2))
            for b in sketch.BITS
        ]
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 0.15 * truth.std()

    def test_known_weights(self) -> None:
        whole, unit = sketch.rounded_weights(np.array([[254, 3, -1, 0, -254.0]], np.float32))
        assert (whole.tolist(), unit.tolist()) == ([[127, 2, 0, 0, -127]], [[2]])
        whole, unit = sketch.rounded_weights(np.array([[1e-40, 0]], np.float32))
        assert whole.tolist() == [[0, 0]]

    @settings(max_examples=20, deadline=None)
    @given(seeds, st.floats(-500, 500))
    def test_shares_of_everything_sum_to_one(self, seed: int, level: float) -> None:
        rng = np.random.default_rng(seed)
        scores, local = rng.normal(size=(2, 64)) * 5 + level, rng.normal(size=2) * 5 + level
        share = sketch.shares(scores, local)
        everything = np.exp(np.column_stack([scores, local]) - level)
        np.testing.assert_allclose(
            share,
            everything[:, :64].reshape(2, 4, 16).sum(axis=2) / everything.sum(axis=1, keepdims=True),
            rtol=1e-9,
        )


class TestWanted:
    SHARE = np.array([0.25, 0.125, 0.0625, 0.03125, 0.0])

    @pytest.mark.parametrize(
        ("page_share", "page_drop", "expected"),
        [
            (0.1, 1.0, [0, 1]),
            (0.125, 1.0, [0]),  # a share has to exceed the cut
            (0.0, 1.0, [0, 1, 2, 3]),
            (0.5, 1.0, []),
            (1.0, 5.0, []),
            (0.1, 0.09375, [0, 1]),  # 0.0625 + 0.03125 is just allowed
            (0.1, 0.09, [0, 1, 2]),  # one halving: 0.05
            (0.125, 0.1, [0, 1]),  # 0.0625: 0.125 exceeds it, 0.0625 does not
            (0.5, 0.0, [0, 1, 2, 3]),  # halved until nothing but the 0 is left out
        ],
    )
    def test_known_answers(self, page_share: float, page_drop: float, expected: list[int]) -> None:
        assert np.flatnonzero(sketch.wanted(self.SHARE, page_share, page_drop)).tolist() == expected

    def test_halved_sixteen_times_at_most(self) -> None:
        share = np.array([2.0**-17, 2.0**-16, 2.0**-15])
        assert sketch.wanted(share, 1.0, 0.0).tolist() == [False, False, True]

    @given(seeds, st.floats(1e-3, 1), st.floats(1e-4, 1))
    def test_what_is_left_out_is_bounded(self, seed: int, page_share: float, page_drop: float) -> None:
        rng = np.random.default_rng(seed)
        share = rng.lognormal(sigma=3, size=40)
        share /= share.sum() * rng.uniform(1, 3)
        free, bound = sketch.wanted(share, page_share, 1.0), sketch.wanted(share, page_share, page_drop)
        assert (bound >= free).all()
        # 40 shares of at most 2^-16 are less than any page_drop here that is not met before.
        assert share[~bound].sum() <= max(float(np.float32(page_drop)), 40 * 2.0**-16 * page_share)

    def test_scored_queries(self) -> None:
        for n, stride in ((1, 1), (16, 1), (17, 2), (32, 2), (33, 3), (48, 3), (49, 4), (64, 4)):
            asked = np.flatnonzero(sketch.scored_queries(np.ones((2, n), bool)))
            assert asked.tolist() == list(range(n - 1, -1, -stride))[::-1]
            assert len(asked) <= 16
        some = np.zeros((2, 64), bool)
        assert not sketch.scored_queries(some).any()
        some[0, [2, 6]] = some[1, 0] = True
        assert np.flatnonzero(sketch.scored_queries(some)).tolist() == [6]
        some[1, 3] = True
        assert np.flatnonzero(sketch.scored_queries(some)).tolist() == [3]

    def test_only_long_heads_of_scored_queries_are_asked(self) -> None:
        """Two heads and 18 queries, each of which wants the one read page whose keys it points at."""
        pages = np.zeros((2, 64, 8), np.float16)
        for page in range(8):
            pages.reshape(8, 16, 8)[page, :, page] = 8
        t = np.arange(18)
        queries = np.eye(8)[[t % 8, (t + 3) % 8]]
        is_long = np.array([t >= 0, t == 1])
        args = sketch.sketch(pages, 3), 1.0, 0.1, 1.0
        reads, scored = sketch.read_pages(queries, is_long, np.zeros((2, 18)), *args)
        assert np.flatnonzero(scored).tolist() == t[1::2].tolist()
        assert np.flatnonzero(reads).tolist() == [1, 3, 4, 5, 7]


def plain_lists(arrays: Arrays, policy: Policy, result: AttentionResult, tiles: list[tuple[int, int]]) -> Any:
    """(reads, scored) of a result by the definitions, one head at a time, from its decisions and masses."""
    q, k, _ = arrays
    group = q.shape[1] // k.shape[1]
    is_long = ~result.decisions.local
    reads, scored = np.zeros_like(result.decisions.reads), np.zeros_like(result.decisions.scored)
    for (start, stop), first in ((tile, h) for tile in tiles for h in range(q.shape[1])):
        end = attention.bulk_end(start, policy.n_sink, policy.n_window)
        sharing = group if (stop - start) * group <= 64 else 1
        if first % sharing:
            continue
        g, heads = first // group, range(first, first + sharing)
        has_long = [t for t in range(start, stop) if is_long[t, heads].any()]
        stride = -(-(stop - start) // 16)
        asked = [t for t in has_long if (stop - 1 - t) % stride == 0] or has_long[-1:]
        n_read = (end - policy.n_sink) // 16
        pages = k[policy.n_sink : end, g].astype(np.float16).reshape(-1, 64, k.shape[2])
        union = np.zeros(n_read, bool)
        for t, h in ((t, h) for t in asked for h in heads if is_long[t, h]):
            order = None if policy.channels is None else policy.channels[0, g]
            bulk = sketch.sketch(pages, policy.page_bits, order)
            scores = sketch.estimated_scores(q[t, h][None], bulk, 0.25)
            weights = np.exp(scores.reshape(n_read, 16)).sum(axis=1)
            share = weights / (weights.sum() + np.exp(result.decisions.local_mass[t, h]))
            cut = policy.page_share
            if stop - start == 1 and policy.decode_share is not None:
                cut = policy.decode_share
            union |= sketch.wanted(share, cut, policy.page_drop)
        for t, h in ((t, h) for t in has_long for h in heads if is_long[t, h]):
            scored[t, h] = t in asked
            reads[t, h, :n_read] = union
    return reads, scored


def cut(n: int, policy: Policy, chunk: int | None) -> list[tuple[int, int]]:
    """Tiles of queries [0, n) that have a bulk, by looking at each query's bulk and batch."""
    key = [(attention.bulk_end(t, policy.n_sink, policy.n_window), t // (chunk or n)) for t in range(n)]
    starts = [t for t in range(n) if t == 0 or key[t] != key[t - 1]]
    spans = zip(starts, [*starts[1:], n], strict=True)
    return [span for span in spans if key[span[0]][0] > policy.n_sink]


policies = st.builds(
    Policy,
    kind=st.sampled_from(["dense", "window", "oracle", "adaptive"]),
    n_sink=st.sampled_from([0, 4, 64]),
    n_window=st.sampled_from([1, 40, 100]),
    granularity=st.sampled_from(["head", "group"]),
    thresholds=st.sampled_from([0.5, 0.9, 0.99]),
    page_bits=st.sampled_from([*sketch.BITS, sketch.GRADED]),
    page_share=st.sampled_from([0.0, 0.005, 0.02, 0.1]),
    decode_share=st.sampled_from([None, 0.002, 0.2]),
    page_drop=st.sampled_from([1.0, 0.3, 0.05]),
)


def with_calibration(policy: Policy, seed: int, heads: tuple[int, int], head_dim: int) -> Policy:
    """With an order of the channels, usual queries, and for a graded sketch every other time a rest."""
    rng = np.random.default_rng(seed)
    order = np.tile(np.arange(head_dim, dtype=np.uint16), (1, heads[1], 1))
    return dataclasses.replace(
        policy,
        channels=rng.permuted(order, axis=2),
        query_means=rng.standard_normal((1, heads[1], head_dim)).astype(np.float32),
        page_rest=0.7 * (seed % 2) if policy.page_bits == sketch.GRADED else 0.0,
    )


class TestAttend:
    @settings(max_examples=25, deadline=None)
    @given(seeds, groupings, policies, chunks)
    def test_lists_outputs_and_statistics_by_the_definitions(
        self, seed: int, heads: tuple[int, int], policy: Policy, chunk: int | None
    ) -> None:
        q, k, v = random_qkv(seed, N, heads)
        policy = with_calibration(policy, seed, heads, 16)
        result = attend(q, k, v, 0.25, policy, chunk=chunk)
        reads, scored = plain_lists((q, k, v), policy, result, cut(N, policy, chunk))
        alone = np.array([chunk == 1 or (chunk == N - 1 == t) for t in range(N)])
        rested = ~result.decisions.local & (alone & result.decisions.has_bulk)[:, None]
        np.testing.assert_array_equal(result.decisions.rested, rested & (policy.page_rest > 0))
        np.testing.assert_array_equal(result.decisions.scored, scored)
        np.testing.assert_array_equal(result.decisions.reads, reads)
        np.testing.assert_allclose(result.output, plain_output((q, k, v), policy, result), atol=1e-6)
        assert result.stats == recount(result, policy, heads, head_dim=16)

    @pytest.mark.parametrize("granularity", ["head", "group"])
    @settings(max_examples=5, deadline=None)
    @given(seed=seeds, bits=bits)
    def test_no_share_is_too_small_for_zero(self, granularity: str, seed: int, bits: int) -> None:
        q, k, v = random_qkv(seed, N)
        whole = Policy("adaptive", thresholds=0.9, granularity=granularity, **GEOMETRY)
        paged = dataclasses.replace(whole, page_bits=bits, page_share=0.0)
        expected, result = attend(q, k, v, 0.25, whole), attend(q, k, v, 0.25, paged)
        np.testing.assert_array_equal(result.output, expected.output)
        np.testing.assert_array_equal(result.decisions.reads, expected.decisions.reads)
        assert result.stats.pages_read == result.stats.pages == expected.stats.pages > 0
        assert result.stats.work_done > expected.stats.work_done
        assert result.stats.bytes_read > expected.stats.bytes_read

    @settings(max_examples=5, deadline=None)
    @given(seeds)
    def test_a_share_that_nothing_exceeds_reads_sinks_and_window(self, seed: int) -> None:
        q, k, v = random_qkv(seed, N)
        window = attend(q, k, v, 0.25, Policy("window", **GEOMETRY))
        result = attend(q, k, v, 0.25, Policy("dense", page_bits=2, page_share=1.0, **GEOMETRY))
        np.testing.assert_array_equal(result.output, window.output)
        assert result.stats.pages_read == 0
        assert result.stats.pages > 0
        assert result.stats.work_done > 0  # of scoring
        assert result.stats.bytes_read > 0

    @settings(max_examples=5, deadline=None)
    @given(seeds, st.sampled_from([0.1, 0.02]))
    def test_a_lone_query_loses_no_more_than_page_drop(self, seed: int, page_drop: float) -> None:
        """Up to what 4 bits misjudge: shares are by the sketch."""
        q, k, v = random_qkv(seed, N)
        policy = Policy("dense", page_bits=4, page_share=0.5, page_drop=page_drop, **GEOMETRY)
        result = attend(q[-1:], k, v, 0.25, policy)
        end = attention.bulk_end(N - 1, 4, 40)
        keys = k[4:end].astype(np.float16).astype(np.float64)
        for h in range(6):
            weights = np.exp(0.25 * keys[:, h // 3] @ q[-1, h])
            skipped = ~np.repeat(result.decisions.reads[0, h], 16)
            lost = weights[skipped].sum() / (weights.sum() + np.exp(result.decisions.local_mass[0, h]))
            assert lost <= 1.5 * page_drop

    @settings(max_examples=5, deadline=None)
    @given(seeds, st.sampled_from([1, 7, 64, 100]))
    def test_batches_cut_tiles_as_separate_calls_do(self, seed: int, chunk: int) -> None:
        q, k, v = random_qkv(seed, N)
        policy = Policy("adaptive", page_bits=3, page_share=0.02, thresholds=0.9, **GEOMETRY)
        first = 101  # batches start where the session stands
        whole = attend(q[first:], k, v, 0.25, policy, chunk=chunk)
        for start in range(first, N, chunk):
            stop = min(N, start + chunk)
            part = attend(q[start:stop], k[:stop], v[:stop], 0.25, policy)
            rows, reads = slice(start - first, stop - first), part.decisions.reads
            np.testing.assert_array_equal(reads, whole.decisions.reads[rows, :, : reads.shape[2]])
            np.testing.assert_array_equal(part.decisions.scored, whole.decisions.scored[rows])
            np.testing.assert_allclose(part.output, whole.output[rows], atol=1e-6)

    def test_heads_share_what_they_read_where_they_are_few_rows(self) -> None:
        """Of three heads, 21 queries are 63 rows and 22 are 66."""
        q, k, v = random_qkv(13, N)
        policy = Policy("dense", page_bits=3, page_share=0.1, **GEOMETRY)
        for n, shared in ((1, True), (21, True), (22, False), (64, False)):
            # Query 299 begins a tile.
            result = attend(q[299 - n : 299], k[:299], v[:299], 0.25, policy)
            last = result.decisions.reads[-1].reshape(2, 3, -1)
            assert (last == last[:, :1]).all() == shared
            assert last.any()

    def test_tiles_share_what_they_read(self) -> None:
        """One query's list grows when its tile has others: this is why batches matter."""
        q, k, v = random_qkv(11, N)
        policy = Policy("dense", page_bits=3, page_share=0.02, **GEOMETRY)
        alone, together = (attend(q, k, v, 0.25, policy, chunk=c).decisions.reads for c in (1, None))
        assert alone.sum() < together.sum()

    def test_without_the_tier_batches_change_nothing(self) -> None:
        q, k, v = random_qkv(12, N)
        policy = Policy("adaptive", thresholds=0.9, **GEOMETRY)
        whole, cut_up = (attend(q, k, v, 0.25, policy, chunk=c) for c in (None, 7))
        np.testing.assert_allclose(cut_up.output, whole.output, atol=1e-6)
        np.testing.assert_array_equal(cut_up.decisions.reads, whole.decisions.reads)
        assert cut_up.stats == whole.stats
        assert not whole.decisions.scored.any()

    @pytest.mark.parametrize(
        "wrong",
        [
            {"page_bits": 1},
            {"page_bits": 5},
            {"page_share": -0.1},
            {"decode_share": -0.1},
            {"page_drop": float("nan")},
            {"page_rest": -0.1},
            {"page_rest": 0.7},
            {"page_rest": 0.7, "page_bits": 3, "query_means": np.zeros((1, 1, 8), np.float32)},
        ],
    )
    def test_wrong_policy_is_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            Policy(**wrong)


def plain_output(arrays: Arrays, policy: Policy, result: AttentionResult) -> np.ndarray:
    """(T, H, d), one query and head at a time over what the decisions say is read, and what stands for the
    rest."""
    q, k, v = arrays
    k, v = k.astype(np.float16).astype(np.float64), v.astype(np.float16).astype(np.float64)
    out = np.empty(q.shape)
    for t, head in np.ndindex(q.shape[:2]):
        g = head // (q.shape[1] // k.shape[1])
        end = attention.bulk_end(t, policy.n_sink, policy.n_window)
        visible = np.ones(t + 1, bool)
        visible[policy.n_sink : end] = np.repeat(result.decisions.reads[t, head], 16)[: end - policy.n_sink]
        p = np.exp(0.25 * (k[: t + 1][visible, g] @ q[t, head]))
        total, weight = p @ v[: t + 1][visible, g], p.sum()
        if result.decisions.rested[t, head]:
            bulk = slice(policy.n_sink, end)
            for value, w in plain_rest(
                k[bulk, g], v[bulk, g], q[t, head], result.decisions.reads[t, head], policy, g
            ):
                total, weight = total + w * value, weight + w
        out[t, head] = total / weight
    return out


def plain_rest(
    k: np.ndarray, v: np.ndarray, query: np.ndarray, reads: np.ndarray, policy: Policy, g: int
) -> Iterator[tuple[np.ndarray, float]]:
    """The value and the weight of what stands for each read page that is left out of a bulk."""
    assert policy.channels is not None
    assert policy.query_means is not None
    pages = sketch.sketch(k.reshape(-1, 64, k.shape[1]), sketch.GRADED, policy.channels[0, g])
    scores = sketch.estimated_scores(query[None], pages, 0.25)[0]
    for i in np.flatnonzero(~reads[: len(k) // 16]):
        page = slice(i // 4 * 64, i // 4 * 64 + 64)
        usual = np.exp(0.25 * (k[page] @ policy.query_means[0, g]))
        value = (usual @ v[page] / usual.sum()).astype(np.float16)
        yield value, np.float32(policy.page_rest) * np.exp(scores[16 * i : 16 * i + 16]).sum()


def recount(result: AttentionResult, policy: Policy, heads: tuple[int, int], head_dim: int) -> LayerStats:
    """What the page tier defines anew of the statistics, one (query, key/value head) at a time."""
    stats = dataclasses.replace(result.stats, work_done=0, bytes_read=0, pages=0, pages_read=0, work_sketch=0)
    group = heads[0] // heads[1]
    decisions = result.decisions
    key_work, key_bytes = 2 * head_dim, 4 * head_dim
    for t, g in np.ndindex(len(decisions.local), heads[1]):
        of_group = range(g * group, (g + 1) * group)
        n_bulk = attention.bulk_end(t, policy.n_sink, policy.n_window) - policy.n_sink
        for h in of_group:
            stats.work_done += 16 * int(decisions.reads[t, h].sum()) * key_work
            if decisions.local[t, h]:
                assert not decisions.scored[t, h]
                assert not decisions.reads[t, h].any()
            if decisions.scored[t, h]:
                scoring = n_bulk * sketch.n_sketched(policy.page_bits, head_dim)
                stats.work_done += scoring
                stats.work_sketch += scoring
        if decisions.local[t, of_group].all():
            continue
        n_read = sum(bool(decisions.reads[t, of_group, page].any()) for page in range(n_bulk // 16))
        stats.pages += n_bulk // 16
        stats.pages_read += n_read
        stats.bytes_read += 16 * n_read * key_bytes
        for h in of_group:
            standing = n_bulk // 64 * head_dim * int(decisions.rested[t, h])
            stats.work_done += standing
            stats.work_sketch += standing
        if decisions.rested[t, of_group].any():
            stats.bytes_read += n_bulk // 64 * 2 * head_dim
        if decisions.scored[t, of_group].any():
            stats.bytes_read += n_bulk // 64 * sketch.page_bytes(head_dim, policy.page_bits)
    return stats
