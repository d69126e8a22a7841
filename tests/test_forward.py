"""The whole forward pass on tiny random models against the numpy reference, and against itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyllm
from pyllm import LLM, Adaptive, Dense, Oracle, Static, Window
from pyllm.attention import Policy
from pyllm.calibration import Calibration
from pyllm.reference import model as reference
from pyllm.reference import weights
from pyllm.reference.attention import Policy as ReferencePolicy
from test_linear import FLOATS, ISAS, QUANTIZED, products
from tiny_models import RopeScaling, write_tiny

SEEDS = st.integers(0, 2**32 - 1)
SHARPEST = [isa for isa in ISAS if products(isa) == "float"][-1]  # for what rounding would hide
fresh_file = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


VOCABULARY = 300


def tiny(folder: Path, arch: str = "llama", **options: Any) -> Path:
    return write_tiny(folder / "tiny.gguf", arch, n_vocab=VOCABULARY, tokenizer=True, **options)


def reference_policy(policy: Policy, labels: Any = None) -> ReferencePolicy:
    kind = type(policy).__name__.lower()
    thresholds = getattr(policy, "threshold", 0.9)
    granularity = getattr(policy, "granularity", "head")
    return ReferencePolicy(kind, policy.sinks, policy.window, granularity, thresholds, labels)


def compare(path: Path, isa: str, tokens: list[int], policy: Policy, labels: Any = None) -> None:
    """Logits of every token. Float noise flips the last bit of a few keys and values on their way to f16, and
    a few decisions that hang on rounding: most tokens are held to a tight bound, all to a wider one."""
    llm = LLM(path, isa=isa, attention=policy, n_batch=48)
    session = llm.session()
    ours = session.eval(tokens, all_logits=True)
    theirs = reference.forward(
        weights.load(path), tokens, reference_policy(policy, labels), products=products(isa)
    )
    assert ours.shape == theirs.logits.shape
    assert np.isfinite(ours).all()
    scale = np.abs(theirs.logits).max()
    error = np.abs(ours - theirs.logits).max(1) / scale
    # Where activations are rounded to 16 bits, float noise flips some of those roundings too, in most tokens.
    rounded = any(tensor.type_name not in {kind.name for kind in FLOATS} for tensor in llm.tensors())
    # A flipped decision changes its token, and later ones a little: one in ten may be off.
    worst = np.quantile(error, 0.9) if isinstance(policy, Oracle | Adaptive) else error.max()
    # Of bfloat16 the reference knows all but the rounding of attention weights.
    half = products(isa) == "bfloat16"
    bound = 3e-3 if half else 5e-4 if rounded else 2e-4
    assert np.median(error) <= bound
    assert worst <= (2e-2 if half else 1e-2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@settings(parent=fresh_file, max_examples=6)
@given(
    seed=SEEDS,
    heads=st.sampled_from([(2, 2), (6, 2), (8, 1)]),
    head_dim=st.sampled_from([32, 64, 80, 128]),
    tied=st.booleans(),
    kind=st.sampled_from([Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_1]),
)
def test_architectures(
    tmp_path: Path,
    isa: str,
    arch: str,
    seed: int,
    heads: tuple[int, int],
    head_dim: int,
    tied: bool,
    kind: Type,
) -> None:
    path = tiny(
        tmp_path, arch, n_heads=heads[0], n_kv_heads=heads[1], head_dim=head_dim,
        dim=96, n_ff=160, types=kind, tied=tied, sharp=4, seed=seed,
    )  # fmt: skip
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, 100).tolist()
    compare(path, isa, tokens, Dense(window=32))


@pytest.mark.parametrize("kind", FLOATS + QUANTIZED, ids=lambda kind: kind.name)
@settings(parent=fresh_file, max_examples=2)
@given(seed=SEEDS)
def test_formats(tmp_path: Path, kind: Type, seed: int) -> None:
    path = tiny(tmp_path, types=kind, seed=seed)
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, 60).tolist()
    compare(path, SHARPEST, tokens, Dense(window=32))


def test_formats_mixed_per_tensor(tmp_path: Path) -> None:
    types = {
        "attn_q": Type.Q4_K,
        "attn_v": Type.Q6_K,
        "ffn_down": Type.F16,
        "token_embd": Type.Q8_0,
        "*": Type.Q5_0,
    }
    path = tiny(tmp_path, types=types, tied=False)
    compare(path, SHARPEST, list(range(100, 180)), Dense(window=32))


@pytest.mark.parametrize(
    "policy",
    [
        Window(window=40),
        Oracle(0.7, window=40, granularity="head"),
        Oracle(0.7, window=40, granularity="group"),
        Adaptive(0.6, window=40, granularity="head"),
        Adaptive(0.6, window=40, granularity="group"),
    ],
    ids=str,
)
@settings(parent=fresh_file, max_examples=4)
@given(seed=SEEDS)
def test_policies(tmp_path: Path, policy: Policy, seed: int) -> None:
    """float32 weights, so that float noise is all that can flip a decision; a flip shows in the logits."""
    path = tiny(tmp_path, dim=64, n_ff=96, sharp=12, seed=seed)
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, 300).tolist()
    compare(path, SHARPEST, tokens, policy)


def test_static_labels(tmp_path: Path) -> None:
    path = tiny(tmp_path, dim=64, n_ff=96, sharp=12)
    labels = np.random.default_rng(1).random((2, 8)) < 0.5
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, 300).tolist()
    compare(path, SHARPEST, tokens, Static(labels, window=40), labels)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScaling("linear", 4.0),
        RopeScaling("yarn", 4.0, original_context=128),
        RopeScaling("yarn", 8.0, original_context=64, attn_factor=0.9, beta_fast=16.0, beta_slow=2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_rope_scaling(tmp_path: Path, arch: str, scaling: RopeScaling | None) -> None:
    path = tiny(tmp_path, arch, dim=64, n_ff=96, sharp=8, rope_scaling=scaling)
    compare(path, SHARPEST, list(range(50)) * 5, Dense(window=32))


@pytest.mark.parametrize("kind", [Type.F16, Type.Q4_1])
def test_biases_of_all_matrices(tmp_path: Path, kind: Type) -> None:
    path = tiny(tmp_path, dim=64, n_ff=96, types=kind, sharp=8, biases=True)
    compare(path, SHARPEST if kind == Type.F16 else ISAS[-1], list(range(50)) * 5, Dense(window=32))


def test_rope_frequencies_of_llama3(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 16, dtype=np.float32)
    path = tiny(tmp_path, dim=64, n_ff=96, sharp=8, rope_freqs=factors)
    compare(path, SHARPEST, list(range(50)) * 5, Dense(window=32))


def overflowing(path: Path, token: int) -> Path:
    """A model of float32 whose keys and values of one token overflow: alone it has a dimension that the first
    layer's norm blows up."""
    tensors = {tensor.name: tensor for tensor in LLM(path).tensors()}
    table, norm = tensors["token_embd.weight"], tensors["blk.0.attn_norm.weight"]
    file = np.memmap(path, np.uint8, "r+")
    embedding = file[table.offset : table.offset + table.size].view(np.float32).reshape(VOCABULARY, -1)
    embedding[:, 0] = np.arange(VOCABULARY) == token
    file[norm.offset : norm.offset + 4].view(np.float32)[0] = 1e30
    file.flush()
    return path


def test_a_batch_that_overflows_says_so(tmp_path: Path) -> None:
    """Also where nobody asks for its logits, or only for one of a token that does not see it. Nothing of the
    call stays behind."""
    path = overflowing(tiny(tmp_path), 7)
    llm = LLM(path, n_batch=32, attention=Window(window=16, sinks=4))
    session, other = llm.session(n_ctx=300), llm.session(n_ctx=300)
    tokens = np.random.default_rng(3).integers(10, VOCABULARY, 250).astype(np.int32)
    for s in (session, other):
        s.eval(tokens[:100])
    bad = tokens[100:].copy()
    bad[50] = 7  # in the second batch of five
    for n_logits in (0, 1, 150):
        with pytest.raises(pyllm.NumericError, match="after position 132"):
            session._native.eval(bad, np.empty((n_logits, VOCABULARY), np.float32))
        assert session.position == 100
    assert np.array_equal(session.eval(tokens[100:]), other.eval(tokens[100:]))


POLICIES = [Dense(window=64), Adaptive(0.6, window=64), Oracle(0.6, window=64), Window(window=64)]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@settings(parent=fresh_file, max_examples=4)
@given(seed=SEEDS, kind=st.sampled_from([Type.F32, Type.Q4_1, Type.Q4_K]))
def test_batches_and_threads_change_no_bit(tmp_path: Path, policy: Policy, seed: int, kind: Type) -> None:
    path = tiny(tmp_path, types=kind, sharp=8, seed=seed)
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, 260).tolist()
    whole = LLM(path, n_batch=512, n_threads=1, attention=policy).session().eval(tokens, all_logits=True)
    pieces = LLM(path, n_batch=33, n_threads=3, attention=policy).session().eval(tokens, all_logits=True)
    session = LLM(path, n_threads=2, attention=policy).session()
    single = np.concatenate([session.eval([token])[None] for token in tokens])
    assert np.array_equal(whole, pieces)
    assert np.array_equal(whole, single)


@settings(parent=fresh_file, max_examples=10)
@given(seed=SEEDS, cut=st.integers(0, VOCABULARY), sinks=st.sampled_from([0, 16]))
def test_rewind_then_replay_is_never_having_gone(tmp_path: Path, seed: int, cut: int, sinks: int) -> None:
    path = tiny(tmp_path, dim=64, n_ff=96, sharp=12, seed=seed)
    llm = LLM(path, attention=Adaptive(0.6, window=32, sinks=sinks))
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, VOCABULARY, 300).tolist(), rng.integers(0, VOCABULARY, 150).tolist()
    gone, never = llm.session(), llm.session()
    gone.eval(first)
    gone.rewind(cut)
    if cut:
        never.eval(first[:cut])
    assert np.array_equal(gone.eval(second, all_logits=True), never.eval(second, all_logits=True))


@settings(parent=fresh_file, max_examples=6)
@given(seed=SEEDS, pages=st.integers(0, 3), bits=st.sampled_from([2, 3, 4]))
def test_rewind_then_replay_with_pages(tmp_path: Path, seed: int, pages: int, bits: int) -> None:
    """At the beginning of a query tile, since tiles share what they read."""
    path = tiny(tmp_path, dim=64, n_ff=96, sharp=12, seed=seed)
    policy = Adaptive(1.1, window=32, sinks=16, page_bits=bits, page_share=0.02)
    llm = LLM(path, attention=policy)
    cut = 32 + 16 - 1 + 64 * pages
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, VOCABULARY, 300).tolist(), rng.integers(0, VOCABULARY, 150).tolist()
    gone, never = llm.session(), llm.session()
    gone.eval(first)
    gone.rewind(cut)
    never.eval(first[:cut])
    assert np.array_equal(gone.eval(second, all_logits=True), never.eval(second, all_logits=True))
    assert gone.stats.total.pages_read is not None


def graded(channels: list[int], queries: float = 0) -> Dense:
    """For the tiny model. channels: of every head, first those that the sketch has most bits of. queries: the
    usual ones, in every channel."""
    squares = np.empty((2, 2, 32))
    squares[..., channels] = np.arange(32, 0, -1)
    covariances = np.broadcast_to(np.eye(32), (2, 2, 32, 32))
    heads = np.ones((2, 2, 32))
    arrays = np.zeros((2, 8, 3)), heads, covariances, heads, squares, queries * heads
    calibration = Calibration(*arrays, (0, 1))
    return Dense(window=32, sinks=16, page_bits="graded", page_share=0.05, calibration=calibration)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (graded(list(range(32))), graded(list(range(31, -1, -1)))),
        (graded(list(range(32)), 0.0), graded(list(range(32)), 3.0)),
    ],
    ids=["channels", "queries"],
)
def test_a_sketch_is_made_anew_for_another_calibration(tiny_model: Path, one: Dense, other: Dense) -> None:
    rng = np.random.default_rng(8)
    llm, ids = LLM(tiny_model, attention=Dense(window=32)), rng.integers(0, 300, 500).tolist()
    logits = {}
    for name, policies in {"one": [one], "other": [other], "other after one": [one, other]}.items():
        session = llm.session()
        session.eval(ids)
        for policy in policies:
            session.attention = policy
            logits[name] = session.eval([1])
            session.rewind(500)
    assert np.array_equal(logits["other after one"], logits["other"])
    assert not np.array_equal(logits["one"], logits["other"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_rest": 1.5}, "page_rest is 1.5, expected 0 to 1"),
        ({"page_rest": float("nan")}, "page_rest is -?nan, expected 0 to 1"),
        ({"page_bits": 3}, "page_rest is 0.6, but only a graded key sketch has what it takes"),
        ({"query_means": None}, "needs the order of the channels and the mean queries"),
        ({"channels": None}, "needs the order of the channels and the mean queries"),
        ({"query_means": np.full((2, 2, 32), np.inf, np.float32)}, "mean query 0 is not finite"),
        ({"query_means": np.zeros((2, 1, 32), np.float32)}, "query_means of shape"),
    ],
)
def test_the_library_checks_what_stands_for_pages(
    tiny_model: Path, change: dict[str, Any], message: str
) -> None:
    session = LLM(tiny_model, attention=graded(list(range(32)))).session()
    with pytest.raises(pyllm.ArgumentError, match=message):
        session._native.set_attention(**{**session.attention.native(2, 8), **change})
    session.eval([1])


def test_nothing_of_an_overflow_stands_for_pages(tmp_path: Path) -> None:
    """Token 7 was in a page that left the window with its batch: of the page's value nothing stays behind."""
    llm = LLM(overflowing(tiny(tmp_path), 7), n_batch=250, attention=graded(list(range(32)), 1.0))
    session, other = llm.session(n_ctx=400), llm.session(n_ctx=400)
    tokens = np.random.default_rng(3).integers(10, VOCABULARY, 300).tolist()
    for s in (session, other):
        s.eval(tokens[:100])
    with pytest.raises(pyllm.NumericError):
        session.eval([*tokens[100:110], 7, *tokens[111:250]])
    for token in tokens[100:]:
        assert np.array_equal(session.eval([token]), other.eval([token]))
    assert session.stats.total.pages_read is not None


@settings(parent=fresh_file, max_examples=4)
@given(seed=SEEDS, pages=st.integers(0, 3))
def test_rewind_load_and_other_policies_with_pages_stood_for(tmp_path: Path, seed: int, pages: int) -> None:
    """Tokens one by one are the same whatever the session held before."""
    llm = LLM(tiny(tmp_path, dim=64, n_ff=96, sharp=12, seed=seed), attention=graded(list(range(32)), 1.0))
    cut = 32 + 16 - 1 + 64 * pages
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, VOCABULARY, 300).tolist(), rng.integers(0, VOCABULARY, 150).tolist()
    gone, never, loaded, switched = (llm.session() for _ in range(4))
    gone.eval(first)
    gone.rewind(cut)
    never.eval(first[:cut])
    loaded.eval(second)
    never.save(tmp_path / "state")
    loaded.load(tmp_path / "state")
    switched.attention = replace(graded(list(range(32)), 1.0), page_rest=0)
    switched.eval(first[:cut])
    switched.attention = graded(list(range(32)), 1.0)
    for token in second:
        expected = never.eval([token])
        for session in (gone, loaded, switched):
            assert np.array_equal(session.eval([token]), expected)


def test_moments_restart_after_a_rewind_under_another_policy(tmp_path: Path) -> None:
    """Pages folded before the rewind must not survive while dense attention moves on without folding."""
    path = tiny(tmp_path, dim=64, n_ff=96, sharp=12)
    llm = LLM(path, attention=Adaptive(0.6, window=32))
    rng = np.random.default_rng(5)
    first, second, third = (rng.integers(0, VOCABULARY, n).tolist() for n in (300, 250, 100))
    gone, never = llm.session(), llm.session()
    gone.eval(first)
    gone.rewind(100)
    never.eval(first[:100])
    for session in (gone, never):
        session.attention = Dense(window=32)
        session.eval(second)
        session.attention = Adaptive(0.6, window=32)
    assert np.array_equal(gone.eval(third, all_logits=True), never.eval(third, all_logits=True))


@settings(parent=fresh_file, max_examples=8)
@given(
    seed=SEEDS,
    start=st.integers(80, 150),
    peeks=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(1, 2)), max_size=3),
    step=st.sampled_from([1, 40]),
)
def test_looking_at_the_moments_of_one_head_changes_no_other(
    tmp_path: Path, seed: int, start: int, peeks: list[tuple[int, int, int]], step: int
) -> None:
    """peeks: layer, key/value head and pages. What is judged afterwards is what numpy finds."""
    path = tiny(tmp_path, dim=64, n_ff=96, sharp=12, seed=seed)
    policy = Adaptive(1.1, window=32, sinks=16)  # no decision hangs on rounding
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, start + 80).tolist()
    session = LLM(path, isa=SHARPEST, attention=policy).session()
    session.eval(tokens[:start])
    for layer, kv_head, n_pages in [(0, 0, 1), *peeks]:
        session.key_moments(layer, kv_head, min(n_pages, (start - 16) // 64))
    theirs = reference.forward(weights.load(path), tokens, reference_policy(policy), products="float").layers
    for first in range(start, start + 80, step):
        record = session.new_record(step)
        session.eval(tokens[first : first + step], record=record)
        for layer, result in enumerate(theirs):
            for name in ("mean_score", "deviation"):
                ours, numpys = getattr(record, name)[layer], getattr(result.decisions, name)
                expected = numpys[first : first + step]
                assert np.allclose(ours, expected, atol=1e-2, rtol=1e-2, equal_nan=True), name


def test_a_full_context_and_one_token_more(tmp_path: Path) -> None:
    path = tiny(tmp_path, dim=64, n_ff=96)
    session = LLM(path, n_ctx=130, attention=Adaptive(0.6, window=16)).session()
    session.eval([1] * 130)
    with pytest.raises(pyllm.ContextError, match="130"):
        session.eval([1])
    assert session.position == 130
