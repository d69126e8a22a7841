"""The numpy reference agrees with itself, with plain formulas, and with llama.cpp on the default model."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm.errors import ArgumentError, FormatError, UnsupportedError
from pyllm.reference import attention, model, moments, rope, sampling, weights
from pyllm.reference.attention import AttentionResult, Policy, attend
from tiny_models import QUANTIZED, WEIGHT_TYPES, RopeScaling, Type, write_tiny

ROOT = Path(__file__).parent.parent
DEFAULT_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
GOLDEN = ROOT / "tests" / "data" / "smollm2-135m.json"

seeds = st.integers(0, 2**32 - 1)
groupings = st.sampled_from([(1, 1), (3, 3), (6, 2), (8, 1)])

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def random_qkv(seed: int, n: int, heads: tuple[int, int] = (6, 2), head_dim: int = 16) -> Arrays:
    """q (n, H, d), k (n, G, d), v (n, G, d): heads differ in sharpness, hence in what they decide."""
    rng = np.random.default_rng(seed)
    n_heads, n_kv_heads = heads
    sharpness = np.geomspace(0.3, 4.0, n_heads)[:, None]
    q = rng.normal(size=(n, n_heads, head_dim)) * sharpness
    k = rng.normal(size=(n, n_kv_heads, head_dim)) + rng.normal(size=(n_kv_heads, head_dim))
    return q, k, rng.normal(size=(n, n_kv_heads, head_dim))


def plain_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, visible: np.ndarray
) -> np.ndarray:
    """One query and head at a time over f16 keys and values; visible: (T, S) bool."""
    k, v = k.astype(np.float16).astype(np.float64), v.astype(np.float16).astype(np.float64)
    out = np.empty(q.shape)
    for t, head in np.ndindex(q.shape[:2]):
        g = head // (q.shape[1] // k.shape[1])
        p = np.exp(scale * (k[visible[t], g] @ q[t, head]))
        out[t, head] = p @ v[visible[t], g] / p.sum()
    return out


def causal(n: int) -> np.ndarray:
    return np.tril(np.ones((n, n), bool))


class TestAttention:
    @settings(max_examples=20, deadline=None)
    @given(seeds, st.integers(1, 150), groupings)
    def test_dense_is_plain_softmax_attention(self, seed: int, n: int, heads: tuple[int, int]) -> None:
        q, k, v = random_qkv(seed, n, heads)
        dense = attend(q, k, v, 0.25, Policy("dense", n_sink=3, n_window=20))
        np.testing.assert_allclose(dense.output, plain_attention(q, k, v, 0.25, causal(n)), atol=1e-6)

    @settings(max_examples=10, deadline=None)
    @given(seeds, st.integers(0, 64), st.integers(1, 100))
    def test_window_reads_sinks_and_window_only(self, seed: int, n_sink: int, n_window: int) -> None:
        n = 260
        q, k, v = random_qkv(seed, n)
        visible = causal(n)
        for t in range(n):
            visible[t, n_sink : attention.bulk_end(t, n_sink, n_window)] = False
        result = attend(q, k, v, 0.25, Policy("window", n_sink=n_sink, n_window=n_window))
        np.testing.assert_allclose(result.output, plain_attention(q, k, v, 0.25, visible), atol=1e-6)

    @pytest.mark.parametrize("granularity", ["head", "group"])
    @settings(max_examples=10, deadline=None)
    @given(seed=seeds)
    def test_threshold_over_one_is_dense(self, granularity: str, seed: int) -> None:
        q, k, v = random_qkv(seed, 300)
        sizes: dict[str, Any] = {"n_sink": 4, "n_window": 32, "granularity": granularity}
        dense = attend(q, k, v, 0.25, Policy("dense", **sizes))
        for kind in ("adaptive", "oracle"):
            result = attend(q, k, v, 0.25, Policy(kind, thresholds=1.001, **sizes))
            np.testing.assert_array_equal(result.output, dense.output)
            assert result.stats == dense.stats
            assert dense.stats.pairs > 0
            assert dense.stats.pairs_local == 0

    @settings(max_examples=5, deadline=None)
    @given(seeds)
    def test_threshold_zero_is_window(self, seed: int) -> None:
        q, k, v = random_qkv(seed, 300)
        window = attend(q, k, v, 0.25, Policy("window", n_sink=4, n_window=32))
        for kind in ("adaptive", "oracle"):
            result = attend(q, k, v, 0.25, Policy(kind, n_sink=4, n_window=32, thresholds=0.0))
            np.testing.assert_array_equal(result.output, window.output)
            assert result.stats == window.stats

    @pytest.mark.parametrize("kind", ["window", "oracle", "adaptive"])
    @settings(max_examples=5, deadline=None)
    @given(seed=seeds)
    def test_empty_bulk_is_dense_and_not_counted(self, kind: str, seed: int) -> None:
        n = 200
        q, k, v = random_qkv(seed, n)
        # The last query has n - n_window - n_sink = 63 tokens between sinks and window: one less than a page.
        result = attend(q, k, v, 0.25, Policy(kind, n_sink=16, n_window=n - 16 - 63))
        np.testing.assert_array_equal(result.output, attend(q, k, v, 0.25, Policy("dense")).output)
        assert result.stats == attention.LayerStats()
        assert result.decisions.local.all()
        assert not result.decisions.has_bulk.any()

    @settings(max_examples=10, deadline=None)
    @given(seeds, st.floats(0.5, 0.99))
    def test_oracle_loses_at_most_what_the_threshold_allows(self, seed: int, threshold: float) -> None:
        q, k, v = random_qkv(seed, 300)
        dense = attend(q, k, v, 0.25, Policy("dense", n_sink=4, n_window=64))
        oracle = attend(q, k, v, 0.25, Policy("oracle", n_sink=4, n_window=64, thresholds=threshold))
        lost = np.exp(
            oracle.decisions.bulk_mass_true
            - np.logaddexp(oracle.decisions.local_mass, oracle.decisions.bulk_mass_true)
        )
        allowed = 1 - float(np.float32(threshold)) + 1e-12
        assert (lost[oracle.decisions.local] <= allowed).all()
        assert (lost[~oracle.decisions.local] >= allowed - 2e-12).all()
        # Dropping a share s moves the output by s·(bulk mean − local mean), at most 2·s·max|v|.
        assert np.abs(oracle.output - dense.output).max() <= 2 * allowed * np.abs(v).max() + 1e-2

    @settings(max_examples=10, deadline=None)
    @given(seeds, st.integers(1, 299), st.sampled_from(["head", "group"]))
    def test_cutting_the_prompt_changes_nothing(self, seed: int, chunk: int, granularity: str) -> None:
        q, k, v = random_qkv(seed, 300)
        policy = Policy("adaptive", n_sink=5, n_window=40, thresholds=0.6, granularity=granularity)
        whole = attend(q, k, v, 0.25, policy)
        for start in range(0, 300, chunk):
            stop = min(300, start + chunk)
            part = attend(q[start:stop], k[:stop], v[:stop], 0.25, policy)
            np.testing.assert_array_equal(part.decisions.local, whole.decisions.local[start:stop])
            np.testing.assert_allclose(part.output, whole.output[start:stop], atol=1e-6)

    @settings(max_examples=10, deadline=None)
    @given(seeds, groupings)
    def test_group_is_local_only_if_every_head_is(self, seed: int, heads: tuple[int, int]) -> None:
        q, k, v = random_qkv(seed, 300, heads)
        sizes: dict[str, Any] = {"n_sink": 4, "n_window": 64, "thresholds": 0.6}
        by_head = attend(q, k, v, 0.25, Policy("adaptive", **sizes))
        by_group = attend(q, k, v, 0.25, Policy("adaptive", granularity="group", **sizes))
        n_heads, n_kv_heads = heads
        expected = by_head.decisions.local.reshape(300, n_kv_heads, -1).all(axis=2)
        np.testing.assert_array_equal(
            by_group.decisions.local, np.repeat(expected, n_heads // n_kv_heads, axis=1)
        )
        assert by_group.stats.bytes_read == by_head.stats.bytes_read
        assert by_group.stats.work_done >= by_head.stats.work_done

    @settings(max_examples=10, deadline=None)
    @given(seeds)
    def test_thresholds_and_labels_are_per_layer_and_head(self, seed: int) -> None:
        q, k, v = random_qkv(seed, 200)
        labels = np.random.default_rng(seed).random((2, 6)) < 0.5
        # Thresholds of 0 and 2 make a head always local and always long.
        static = Policy("static", n_sink=4, n_window=32, static_local=labels)
        adaptive = Policy("adaptive", n_sink=4, n_window=32, thresholds=np.where(labels, 0.0, 2.0))
        for layer in (0, 1):
            result = attend(q, k, v, 0.25, static, layer)
            np.testing.assert_array_equal(result.output, attend(q, k, v, 0.25, adaptive, layer).output)
            expected = np.broadcast_to(labels[layer], (int(result.decisions.has_bulk.sum()), 6))
            np.testing.assert_array_equal(result.decisions.local[result.decisions.has_bulk], expected)

    @pytest.mark.parametrize("granularity", ["head", "group"])
    @settings(max_examples=5, deadline=None)
    @given(seed=seeds, heads=groupings)
    def test_statistics_equal_a_recount(self, granularity: str, seed: int, heads: tuple[int, int]) -> None:
        q, k, v = random_qkv(seed, 250, heads)
        policy = Policy("adaptive", n_sink=7, n_window=50, thresholds=0.7, granularity=granularity)
        result = attend(q[100:], k, v, 0.25, policy)
        assert result.stats == recount(result, 100, policy, heads, head_dim=16)

    def test_bulk_end(self) -> None:
        # (t, n_sink, n_window): a page joins the bulk with the first query whose window it has left whole.
        known = {(0, 16, 8): 16, (86, 16, 8): 16, (87, 16, 8): 80, (150, 16, 8): 80, (151, 16, 8): 144}
        known |= {(64, 0, 1): 64, (63, 0, 1): 0, (5000, 16, 1024): 3920}
        for (t, n_sink, n_window), end in known.items():
            assert attention.bulk_end(t, n_sink, n_window) == end, (t, n_sink, n_window)

    @given(st.integers(0, 5000), st.integers(0, 64), st.integers(1, 2000))
    def test_window_keeps_its_tokens(self, t: int, n_sink: int, n_window: int) -> None:
        end = attention.bulk_end(t, n_sink, n_window)
        assert (end - n_sink) % attention.PAGE == 0
        if end > n_sink:
            assert n_window <= t + 1 - end < n_window + attention.PAGE

    @pytest.mark.parametrize(
        "wrong",
        [{"kind": "sparse"}, {"kind": "static"}, {"granularity": "layer"}, {"n_sink": 65}, {"n_window": 0}],
    )
    def test_wrong_policy_is_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"expected|missing"):
            Policy(**wrong)


def recount(
    result: AttentionResult, first: int, policy: Policy, heads: tuple[int, int], head_dim: int
) -> attention.LayerStats:
    """The statistics by the definitions in pyllm.h, one triple at a time."""
    stats = attention.LayerStats()
    n_heads, n_kv_heads = heads
    for row, local in enumerate(result.decisions.local):
        t = first + row
        bulk = range(policy.n_sink, attention.bulk_end(t, policy.n_sink, policy.n_window))
        if len(bulk) == 0:
            continue
        for head in range(n_heads):
            stats.pairs += 1
            stats.pairs_local += bool(local[head])
            stats.work += len(bulk) * 2 * head_dim
            stats.work_done += 0 if local[head] else len(bulk) * 2 * head_dim
        for g in range(n_kv_heads):
            group = local[g * n_heads // n_kv_heads : (g + 1) * n_heads // n_kv_heads]
            stats.bytes += len(bulk) * 4 * head_dim
            stats.bytes_read += 0 if group.all() else len(bulk) * 4 * head_dim
            stats.pages += 0 if group.all() else len(bulk) // 16
            stats.pages_read += 0 if group.all() else len(bulk) // 16
    return stats


class TestMoments:
    @settings(max_examples=10, deadline=None)
    @given(seeds, st.integers(0, 64), st.floats(0.0, 100.0))
    def test_equal_mean_and_covariance_at_every_page(self, seed: int, n_sink: int, offset: float) -> None:
        keys = np.random.default_rng(seed).normal(size=(n_sink + 5 * attention.PAGE, 8)) + offset
        running = moments.Moments.empty(8)
        for end in range(n_sink + attention.PAGE, len(keys) + 1, attention.PAGE):
            running = attention.fold_pages(running, keys, n_sink, end)
            assert running.n == end - n_sink
            np.testing.assert_allclose(running.mean, keys[n_sink:end].mean(axis=0), rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(
                running.covariance, np.cov(keys[n_sink:end], rowvar=False, ddof=0), rtol=1e-9, atol=1e-11
            )

    @settings(max_examples=10, deadline=None)
    @given(seeds)
    def test_pipeline_folds_the_keys_as_stored(self, seed: int) -> None:
        q, k, v = random_qkv(seed, 300)
        result = attend(q, k, v, 0.25, Policy("dense", n_sink=4, n_window=32))
        bulk = k[4 : attention.bulk_end(299, 4, 32)].astype(np.float16).astype(np.float64)
        for g, m in enumerate(result.moments):
            np.testing.assert_allclose(m.mean, bulk[:, g].mean(axis=0), atol=1e-12)

    @pytest.mark.parametrize("form", moments.FORMS)
    def test_one_repeated_key_is_estimated_exactly(self, form: str) -> None:
        key = np.random.default_rng(7).normal(size=16)
        m = moments.Moments.of(np.tile(key, (128, 1)))
        queries = np.random.default_rng(8).normal(size=(5, 16))
        # ln Φ(√(2 ln 128)) = −0.0009 is what "truncated" subtracts from an exact answer.
        expected = math.log(128) + 0.5 * queries @ key
        np.testing.assert_allclose(moments.bulk_mass(queries, m, 0.5, form), expected, atol=1e-3)

    @settings(max_examples=10, deadline=None)
    @given(seeds)
    def test_gaussian_keys_are_estimated_well(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        keys = rng.normal(size=(16384, 8)) @ rng.normal(size=(8, 8))
        queries = rng.normal(size=(20, 8))
        queries /= (queries @ keys.T).std(
            axis=1, keepdims=True
        )  # σ = 1: 16,384 draws give ln of the mean to 0.01
        truth = np.log(np.exp(queries @ keys.T).sum(axis=1))
        estimate = moments.bulk_mass(queries, moments.Moments.of(keys), 1.0)
        np.testing.assert_allclose(estimate, truth, atol=0.1)

    @given(st.floats(0.0, 60.0), st.integers(2, 100_000))
    def test_finite_forms_stay_below_the_papers(self, sigma: float, n: int) -> None:
        variance = np.array([sigma**2])
        paper, frozen, truncated = (moments.log_mean_exp(variance, n, form)[0] for form in moments.FORMS)
        assert frozen <= paper + 1e-9
        assert truncated <= paper + 1e-9
        # Neither falls below the mean over N draws of which one is at the edge: the largest draw over N.
        edge = math.sqrt(2 * math.log(n))
        assert frozen >= sigma * edge - math.log(n) - 1e-9

    def test_log_normal_cdf(self) -> None:
        # Φ(0) = 1/2; Φ(−1.96) = 0.0249979; the logarithms at −10 and −40 as published tables give them.
        known = {
            0.0: math.log(0.5),
            -1.96: math.log(0.0249979),
            -10.0: -53.23128515051247,
            -40.0: -804.6084420137538,
        }
        for x, expected in known.items():
            np.testing.assert_allclose(moments.log_normal_cdf(np.array([x])), expected, rtol=1e-6)

    def test_unknown_form_is_refused(self) -> None:
        with pytest.raises(ValueError, match="form is 'cubic'"):
            moments.log_mean_exp(np.ones(1), 64, "cubic")


class TestRope:
    @pytest.mark.parametrize("kind", ["norm", "neox"])
    @settings(max_examples=20, deadline=None)
    @given(seed=seeds, shift=st.integers(0, 5000))
    def test_scores_depend_on_the_distance_only(self, kind: str, seed: int, shift: int) -> None:
        config = rope.RopeConfig(kind, 64, 10000.0)
        q, k = np.random.default_rng(seed).normal(size=(2, 1, 1, 64)).astype(np.float32)

        def score(query_position: int, key_position: int) -> float:
            rotated_q = rope.rotate(q, np.array([query_position]), config).astype(np.float64)
            return float((rotated_q * rope.rotate(k, np.array([key_position]), config)).sum())

        assert score(17 + shift, 5 + shift) == pytest.approx(score(17, 5), abs=2e-5)
        assert score(0, 0) == pytest.approx(float((q.astype(np.float64) * k).sum()), abs=1e-5)

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [
            ("norm", [math.cos(1), math.sin(1), -math.sin(0.1), math.cos(0.1)]),
            ("neox", [math.cos(1), -math.sin(0.1), math.sin(1), math.cos(0.1)]),
        ],
    )
    def test_known_rotation(self, kind: str, expected: list[float]) -> None:
        # n_rot 4 and base 100 turn the first pair by 1 radian at position 1, the second by 0.1.
        x = np.array([[[1, 0, 0, 1]]], np.float32)
        out = rope.rotate(x, np.array([1]), rope.RopeConfig(kind, 4, 100.0))
        np.testing.assert_allclose(out[0, 0], expected, atol=1e-7)

    def test_linear_scaling_divides_positions(self) -> None:
        x = np.random.default_rng(3).normal(size=(1, 2, 32)).astype(np.float32)
        plain, linear = rope.RopeConfig("neox", 32, 1e4), rope.RopeConfig("neox", 32, 1e4, "linear", 4.0)
        np.testing.assert_allclose(
            rope.rotate(x, np.array([400]), linear), rope.rotate(x, np.array([100]), plain), atol=1e-6
        )

    def test_llama3_factors_divide_frequencies(self) -> None:
        factors = np.linspace(1.0, 8.0, 16)
        plain, scaled = (
            rope.RopeConfig("norm", 32, 5e5),
            rope.RopeConfig("norm", 32, 5e5, freq_factors=factors),
        )
        np.testing.assert_allclose(rope.frequencies(scaled) * factors, rope.frequencies(plain))

    def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones(self) -> None:
        config = rope.RopeConfig("neox", 128, 1e6, "yarn", 4.0, original_context=32768)
        ratio = rope.frequencies(rope.RopeConfig("neox", 128, 1e6)) / rope.frequencies(config)
        turns = 32768 * rope.frequencies(rope.RopeConfig("neox", 128, 1e6)) / (2 * math.pi)
        # The ramp's ends are rounded outwards to whole pairs; the margin is one pair: 1e6^(1/64) = 1.24.
        np.testing.assert_allclose(ratio[turns > 32 * 1.25], 1.0)
        np.testing.assert_allclose(ratio[turns < 1 / 1.25], 4.0)
        assert (np.diff(ratio) >= -1e-12).all()
        assert rope.magnitude(config) == pytest.approx(1.0 + 0.1 * math.log(4.0))


class TestRounding:
    @given(seeds, st.floats(1e-30, 1e30))
    def test_error_is_half_a_step(self, seed: int, size: float) -> None:
        x = (np.random.default_rng(seed).normal(size=(3, 96)) * size).astype(np.float32)
        step = np.abs(x.reshape(3, 3, 32)).max(axis=-1, keepdims=True) / 32512
        error = np.abs(model.rounded_to_int16(x) - x).reshape(3, 3, 32)
        # Half a step, and float32's rounding of quotient and product, each 2^-24 of |q| <= 32512.5 steps.
        assert (error <= step * (0.5 + 2 * 32512.5 * 2.0**-24)).all()

    def test_known_answers(self) -> None:
        x = np.zeros((1, 64), np.float32)
        x[0, :7] = [32512, 0.5, 1.5, 2.5, -0.5, -1.5, 100]
        expected = np.zeros((1, 64), np.float32)
        expected[0, :7] = [32512, 0, 2, 2, 0, -2, 100]
        np.testing.assert_array_equal(model.rounded_to_int16(x), expected)
        np.testing.assert_array_equal(model.rounded_to_int16(np.full((1, 32), 1e-45, np.float32)), 0)

    def test_only_quantized_weights_round_their_input(self) -> None:
        rng = np.random.default_rng(11)
        x, w = rng.normal(size=(4, 64)).astype(np.float32), rng.normal(size=(8, 64)).astype(np.float32)
        np.testing.assert_array_equal(model.linear(x, weights.Tensor(w, False)), x @ w.T)
        rounded = model.linear(x, weights.Tensor(w, True))
        assert not np.array_equal(rounded, x @ w.T)
        np.testing.assert_allclose(rounded, x @ w.T, atol=5e-3)


def test_rms_norm_and_silu_known_answers() -> None:
    x = np.array([[3.0, 4.0]], np.float32)
    normed = model.rms_norm(x, np.array([1.0, 2.0], np.float32), 0.0)
    np.testing.assert_allclose(normed, [[3 / math.sqrt(12.5), 8 / math.sqrt(12.5)]], rtol=1e-6)
    x = np.array([0.0, 1.0, -1.0, 200.0, -200.0], np.float32)
    np.testing.assert_allclose(model.silu(x), [0, 0.7310586, -0.26894143, 200, 0], atol=1e-6)


TOKENS = [5, 100, 31, 7, 250, 9, 9, 64, 3, 200, 17, 300]


class TestForward:
    @pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_tokens_do_not_see_the_future(self, arch: str, tied: bool, tmp_path: Path) -> None:
        tiny = weights.load(write_tiny(tmp_path / "m.gguf", arch, tied=tied, sharp=4.0))
        whole = model.forward(tiny, TOKENS).logits
        assert np.isfinite(whole).all()
        np.testing.assert_allclose(model.forward(tiny, TOKENS[:5]).logits, whole[:5], atol=1e-4)
        # The matrix product of two rows may round otherwise than that of all.
        np.testing.assert_allclose(model.forward(tiny, TOKENS, n_logits=2).logits, whole[-2:], atol=1e-4)
        assert not np.allclose(model.forward(tiny, [6, *TOKENS[1:]]).logits[-1], whole[-1], atol=1e-3)

    @pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=lambda kind: kind.name)
    def test_every_weight_type_loads(self, kind: Type, tmp_path: Path) -> None:
        tiny = weights.load(write_tiny(tmp_path / "m.gguf", types=kind, n_layers=1))
        matrix = tiny.tensor("blk.0.attn_k.weight")
        assert matrix.quantized == (kind in QUANTIZED)
        assert matrix.values.shape == (64, 256)
        assert 0.05 < matrix.values.std() < 0.08
        exact = model.forward(tiny, TOKENS, activation_bits=None).logits
        rounded = model.forward(tiny, TOKENS).logits
        assert np.array_equal(exact, rounded) == (kind not in QUANTIZED)
        np.testing.assert_allclose(rounded, exact, atol=0.02)

    def test_types_are_chosen_per_tensor(self, tmp_path: Path) -> None:
        types = {"attn_v": Type.Q6_K, "token_embd": Type.Q8_0, "*": Type.Q4_K}
        reader = gguf.GGUFReader(str(write_tiny(tmp_path / "m.gguf", types=types, n_layers=1)))
        kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
        assert kinds["blk.0.attn_v.weight"] == Type.Q6_K
        assert kinds["token_embd.weight"] == Type.Q8_0
        assert kinds["blk.0.ffn_up.weight"] == Type.Q4_K
        assert kinds["blk.0.attn_norm.weight"] == Type.F32

    def test_architectures_differ_where_they_should(self, tmp_path: Path) -> None:
        qwen2 = weights.load(write_tiny(tmp_path / "q2.gguf", "qwen2"))
        assert qwen2.config.rope.kind == "neox"
        without = {name: t for name, t in qwen2.tensors.items() if not name.endswith(".bias")}
        with_bias = model.forward(qwen2, TOKENS).logits
        assert not np.allclose(
            with_bias, model.forward(weights.Model(qwen2.config, without), TOKENS).logits, atol=1e-2
        )
        qwen3 = weights.load(write_tiny(tmp_path / "q3.gguf", "qwen3", head_dim=64))
        assert qwen3.config.head_dim == 64
        _, k, v = model.project_qkv(qwen3, 0, np.ones((3, 256), np.float32), True)
        norm = qwen3.tensor("blk.0.attn_k_norm.weight").values
        # RoPE keeps a pair's length, so at position 0 the normalized head is seen as it is.
        np.testing.assert_allclose(np.mean((k[0] / norm) ** 2, axis=-1), 1.0, rtol=1e-3)
        assert k.shape == v.shape == (3, 2, 64)

    def test_config_follows_the_keys(self, tmp_path: Path) -> None:
        scaling = RopeScaling(
            "yarn", 4.0, original_context=1024, attn_factor=0.5, beta_fast=16.0, beta_slow=2.0
        )
        factors = np.linspace(1, 4, 16)
        path = write_tiny(
            tmp_path / "m.gguf",
            rope_scaling=scaling,
            rope_freqs=factors,
            attention_scale=0.3,
            n_ctx_train=4096,
        )
        config = weights.load(path).config
        assert config.scale == pytest.approx(0.3)
        assert config.rope.original_context == 1024
        assert (config.rope.beta_fast, config.rope.beta_slow) == (16.0, 2.0)
        assert rope.magnitude(config.rope) == pytest.approx(0.5 * (1 + 0.1 * math.log(4.0)))
        assert config.rope.freq_factors is not None
        np.testing.assert_allclose(config.rope.freq_factors, factors, rtol=1e-6)
        assert weights.load(write_tiny(tmp_path / "n.gguf")).config.scale == pytest.approx(32**-0.5)

    @pytest.mark.parametrize("arch", ["llama", "qwen3"])
    def test_random_models_make_decisions_that_vary(self, arch: str, tmp_path: Path) -> None:
        tiny = weights.load(write_tiny(tmp_path / "m.gguf", arch, sharp=6.0, n_ff=256))
        tokens = np.random.default_rng(5).integers(0, tiny.config.n_vocab, 300).tolist()
        policy = Policy("adaptive", n_sink=4, n_window=64, thresholds=0.4)
        for layer in model.forward(tiny, tokens, policy, n_logits=1).layers:
            local = layer.decisions.local[layer.decisions.has_bulk]
            assert 0.05 < local.mean() < 0.95
            assert (local.any(axis=0) & ~local.all(axis=0)).sum() >= 2

    def test_bad_input_is_refused(self, tmp_path: Path) -> None:
        tiny = weights.load(write_tiny(tmp_path / "m.gguf"))
        with pytest.raises(ArgumentError, match="empty"):
            model.forward(tiny, [])
        with pytest.raises(ArgumentError, match="token 320 is out of range, the model has 320"):
            model.forward(tiny, [1, 320])
        windowed = dataclasses.replace(tiny.config, sliding_window=len(TOKENS))
        model.forward(weights.Model(windowed, tiny.tensors), TOKENS)
        with pytest.raises(UnsupportedError, match="13 tokens exceed the model's sliding window of 12"):
            model.forward(weights.Model(windowed, tiny.tensors), [*TOKENS, 1])
        with pytest.raises(
            UnsupportedError, match="RoPE scaling 'longrope' is not one of none, linear, yarn"
        ):
            weights.load(write_tiny(tmp_path / "r.gguf", rope_scaling=RopeScaling("longrope", 4.0)))
        with pytest.raises(UnsupportedError, match="architecture 'mamba' is not one of llama, qwen2, qwen3"):
            weights.load(write_tiny(tmp_path / "u.gguf", "mamba"))
        tensors = {name: t for name, t in tiny.tensors.items() if name != "blk.1.ffn_up.weight"}
        with pytest.raises(FormatError, match=r"'blk\.1\.ffn_up\.weight' is missing"):
            model.forward(weights.Model(tiny.config, tensors), TOKENS)


class TestSampling:
    LOGITS = np.log([0.5, 0.2, 0.15, 0.1, 0.05])

    @pytest.mark.parametrize(
        ("params", "recent", "expected"),
        [
            ({}, [], [0.5, 0.2, 0.15, 0.1, 0.05]),
            ({"temperature": 0}, [], [1, 0, 0, 0, 0]),
            ({"top_k": 2}, [], [5 / 7, 2 / 7, 0, 0, 0]),
            ({"top_p": 0.6}, [], [5 / 7, 2 / 7, 0, 0, 0]),
            ({"top_p": 0.0}, [], [1, 0, 0, 0, 0]),
            ({"min_p": 0.25}, [], [0.5 / 0.85, 0.2 / 0.85, 0.15 / 0.85, 0, 0]),
            ({"temperature": 0.5, "top_k": 2}, [], [25 / 29, 4 / 29, 0, 0, 0]),
            # top_p looks at what top_k left: 5/7 >= 0.7 keeps one, where 0.5 of the whole would keep two.
            ({"top_k": 2, "top_p": 0.7}, [], [1, 0, 0, 0, 0]),
            # Temperature comes last: it does not change which tokens are kept.
            ({"temperature": 100.0, "top_p": 0.45}, [], [1, 0, 0, 0, 0]),
            ({"temperature": 0, "presence_penalty": 1.0}, [0], [0, 1, 0, 0, 0]),
            ({"temperature": 0, "frequency_penalty": 0.5}, [0], [1, 0, 0, 0, 0]),
            ({"temperature": 0, "frequency_penalty": 0.5}, [0, 0], [0, 1, 0, 0, 0]),
            ({"top_k": 1, "repeat_penalty": 3.0}, [0], [0, 1, 0, 0, 0]),
        ],
    )
    def test_known_answers(self, params: dict[str, Any], recent: list[int], expected: list[float]) -> None:
        p = sampling.distribution(self.LOGITS, sampling.Sampling(**params), recent)
        np.testing.assert_allclose(p, expected, atol=1e-12)

    def test_repeat_penalty_divides_positive_and_multiplies_negative_logits(self) -> None:
        params = sampling.Sampling(repeat_penalty=2.0)
        penalized = sampling.penalize(np.array([4.0, -4.0, 4.0, -4.0]), params, [0, 1, 1])
        np.testing.assert_array_equal(penalized, [2.0, -8.0, 4.0, -4.0])

    def test_equal_logits_keep_the_lower_id(self) -> None:
        # Enough ties, at every second id, that a sort which is not stable would mix them.
        logits = np.tile([1.0, 2.0], 500)
        p = sampling.distribution(logits, sampling.Sampling(top_k=4))
        np.testing.assert_array_equal(np.flatnonzero(p), [1, 3, 5, 7])
        np.testing.assert_allclose(p[[1, 3, 5, 7]], 0.25)


@pytest.mark.slow
def test_default_model_agrees_with_llama_cpp() -> None:
    """KL(p‖q) <= 0.02 over the listed ids and one bucket for the rest, and the same next token."""
    if not DEFAULT_MODEL.exists():
        pytest.skip(f"{DEFAULT_MODEL.relative_to(ROOT)} is not here")
    default = weights.load(DEFAULT_MODEL)
    short = [g for g in json.loads(GOLDEN.read_text())["greedy"] if len(g["prompt_ids"]) < 100]
    assert len(short) == 4
    for case in short:
        ids, log_p = np.array(case["next_logprobs_top20"]).T
        for bits in (16, 8, None):
            result = model.forward(default, case["prompt_ids"], None, 1, bits)
            log_q = log_softmax(result.logits[0].astype(np.float64))
            kl = kl_with_rest(log_p, log_q[ids.astype(int)])
            print(f"{case['prompt']!r}: KL {kl:.4f} nats, activations of {bits or 32} bits")
            assert kl <= 0.02
            assert np.argmax(log_q) == case["continuation_ids"][0]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def kl_with_rest(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """KL(p‖q) over the listed log probabilities and one bucket that holds the rest of each."""
    rest_p, rest_q = 1 - np.exp(log_p).sum(), 1 - np.exp(log_q).sum()
    rest = rest_p * math.log(rest_p / rest_q) if rest_p > 0 else 0.0
    return float((np.exp(log_p) * (log_p - log_q)).sum() + rest)
