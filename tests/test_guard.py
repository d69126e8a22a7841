"""The guard at work: the same decisions however a prompt is cut, detection, repair, control, hold-back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import native
from pyllm import LLM, Adaptive, ArgumentError, Calibration, Dense, Guard, PyllmError, Session, _native
from pyllm.evaluate import texts
from pyllm.generation import Request, Sampling, TokenLogprob
from pyllm.guard.controller import Control
from pyllm.guard.tally import Tally
from pyllm.guard.timeline import Stretch
from pyllm.guard.watch import Watch
from pyllm.verified import VerifiedGeneration
from tiny_models import write_tiny

N_CTX = 1024
POLICY = Adaptive(0.6, granularity="head", window=64)
# Over this many lost shares of the tiny model's layers some audits go and others do not.
GUARD = Guard(audit_rate=1 / 16, promise=0.7, control_period=64, lost_limit=0.15)


def ids(n: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 256, n)]


def session(llm: LLM, policy: Any = POLICY, guard: Guard | None = GUARD) -> Session:
    return llm.session(n_ctx=N_CTX, attention=policy, guard=guard)


def state(session: Session) -> bytes:
    return session._native.save().tobytes()


def thresholds(session: Session) -> np.ndarray:
    """Per layer, of the first head, as the controller has them now."""
    assert session.watch
    return np.asarray(session.watch._controller.native(session.watch.control)["thresholds"])


# ---- the same tokens, the same decisions ----


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 599), st.integers(1, 99)), max_size=2),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_decisions_do_not_depend_on_how_a_prompt_is_cut(
    tiny: LLM, cuts: list[int], turns: list[tuple[int, int]]
) -> None:
    """Nor on what was evaluated and rewound before."""
    tokens = ids(600)
    whole = session(tiny)
    expected = whole.eval(tokens)
    assert whole.stats.guard
    assert whole.stats.guard.repairs > 0
    other = session(tiny)
    for n, seed in turns:
        other.sync(tokens[:n] + ids(seed, seed))
    if other.position:
        other.rewind(other.position // 2)
    kept = next((i for i, (a, b) in enumerate(zip(other.tokens, tokens, strict=False)) if a != b), None)
    other.rewind(other.position if kept is None else kept)
    for n in cuts:
        if other.position + n < 600:
            other.eval(tokens[other.position : other.position + n])
    logits = other.eval(tokens[other.position :]) if other.position < 600 else other.sync(tokens)
    np.testing.assert_array_equal(logits, expected)
    assert state(other) == state(whole)
    np.testing.assert_array_equal(thresholds(other), thresholds(whole))


def test_token_by_token_is_the_same_too(tiny: LLM) -> None:
    tokens = ids(400)
    whole, single = session(tiny), session(tiny)
    expected = whole.eval(tokens)
    for token in tokens:
        logits = single.eval([token])
    np.testing.assert_array_equal(logits, expected)
    assert state(single) == state(whole)
    assert single.stats.guard
    assert whole.stats.guard
    assert single.stats.guard.repairs == whole.stats.guard.repairs > 0


def test_another_seed_audits_others(tiny: LLM) -> None:
    found = []
    for seed in (0, 1):
        guarded = session(tiny, guard=Guard(audit_rate=1 / 16, repair=False, seed=seed))
        guarded.eval(ids(600))
        assert guarded.watch
        found.append([audit.position for audit in guarded.watch._timeline.audits])
    assert found[0] != found[1]
    assert len(found[0]) == pytest.approx((600 - 143) / 16, abs=2)


def test_a_guard_that_is_refused_leaves_the_one_before(sharp: LLM, tmp_path: Path) -> None:
    session = sharp.session(attention=BROKEN, guard=Guard(audit_rate=1.0, log=tmp_path / "log"))
    for wrong in (Guard(log=tmp_path / "nowhere" / "log"), Guard(start=Control.none(7))):
        with pytest.raises(PyllmError):
            session.guard = wrong
    session.eval(ids(200))
    assert session.stats.guard is not None
    assert session.stats.guard.audits > 0
    with pytest.raises(ArgumentError, match="start"):
        session.guard = Guard(log=tmp_path / "log", start=Control.none(7))
    session.eval(ids(10))  # without the log, which the refused one was to have
    session.guard = Guard(log=tmp_path / "log")  # its own file, once more
    assert session.stats.guard is not None
    assert session.stats.guard.audits == 0


# ---- injected faults: detected, repaired, brought back under the target ----

# Layer 1 never looks back.
BROKEN = Adaptive([0.6, 0.0], granularity="head", window=64)
PAGED = Adaptive(1.5, window=64, page_bits=3, page_share=0.01)


@pytest.fixture(scope="module")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Looks at few tokens at once, so that it matters which are left out."""
    return LLM(write_tiny(tmp_path_factory.mktemp("sharp") / "sharp.gguf", tokenizer=True, sharp=12.0))


def mirror_sketch(session: Session) -> None:
    """What the session's key sketches say is the contrary of what is."""
    address = int(_native.library()[0].cast("uintptr_t", session._native.handle))
    for layer in range(session._model.info.n_layers):
        native.lib.hook_mirror_sketch(native.ffi.cast("pyllm_session *", address), layer)


def repaired(session: Session, tokens: list[int]) -> tuple[Stretch, np.ndarray]:
    """Evaluates token by token until a repair; what it made dense, and the logits after it."""
    for token in tokens:
        logits = session.eval([token])
        if session.watch and session.watch.last_repair:
            return session.watch.last_repair, logits
    pytest.fail("no repair")


def test_a_head_that_never_looks_back_is_repaired(sharp: LLM) -> None:
    """What is in the cache is then what dense attention gives from the last clean audit on."""
    tokens = ids(700)
    guard = Guard(audit_rate=1 / 16, control_period=1024, lost_limit=0.6)
    guarded = session(sharp, BROKEN, guard)
    stretch, logits = repaired(guarded, tokens)
    assert guarded.watch
    assert stretch.first == guarded.watch._timeline.audits[-2].position + 1
    assert guarded.tokens == tokens[: stretch.cause + 1]
    plain = session(sharp, BROKEN, None)
    plain.eval(tokens[: stretch.first])
    plain.attention = Dense(window=64)
    expected = plain.eval(tokens[stretch.first : stretch.cause + 1])
    np.testing.assert_array_equal(logits, expected)
    assert state(guarded) == state(plain)
    found = guarded.stats.guard
    assert found
    assert (found.repairs, found.over_limit) == (1, 1)
    assert found.repaired_tokens == stretch.cause + 1 - stretch.first
    faulty = session(sharp, BROKEN, None)
    faulty.eval(tokens[: stretch.cause + 1])
    assert state(faulty) != state(plain)


def test_a_damaged_sketch_is_repaired(sharp: LLM) -> None:
    tokens = ids(900)
    guard = Guard(audit_rate=1 / 16, control_period=2048, lost_limit=0.3)
    healthy = session(sharp, PAGED, guard)
    healthy.eval(tokens)
    guarded, plain = session(sharp, PAGED, guard), session(sharp, PAGED, None)
    guarded.eval(tokens[:600])
    mirror_sketch(guarded)
    stretch, logits = repaired(guarded, tokens[600:])
    assert stretch.cause >= 600
    plain.eval(tokens[:600])
    mirror_sketch(plain)
    for token in tokens[600 : stretch.first]:
        plain.eval([token])
    plain.rewind(stretch.first)
    plain.attention = Dense(window=64)
    expected = plain.eval(tokens[stretch.first : stretch.cause + 1])
    np.testing.assert_array_equal(logits, expected)
    assert state(guarded) == state(plain)
    assert healthy.stats.guard
    assert healthy.stats.guard.repairs == 0


def test_a_preset_is_repaired(sharp: LLM) -> None:
    """A fitted estimate, pages and layers that never are local, as profiles have them."""
    n_kv_heads, head_dim = sharp.info.n_kv_heads, sharp.info.head_dim
    coefficients = np.broadcast_to([0.3, 0.4, 0.1], (2, sharp.info.n_heads, 3))
    means = np.zeros((2, n_kv_heads, head_dim))
    covariances = np.broadcast_to(np.eye(head_dim), (2, n_kv_heads, head_dim, head_dim))
    fitted = Calibration(coefficients, means, covariances, means + 1, means + 1, means + 1, (16, 600))
    preset = Adaptive(
        [0.05, 2.0], window=64, page_bits="graded", page_share=0.05, estimate="maximum", calibration=fitted
    )
    tokens, guard = ids(900), Guard(audit_rate=1 / 16, control_period=1024, lost_limit=0.5)
    guarded = session(sharp, preset, guard)
    stretch, logits = repaired(guarded, tokens)
    plain, faulty = session(sharp, preset, None), session(sharp, preset, None)
    for token in tokens[: stretch.cause + 1]:  # as guarded had them: pages depend on how a prompt is cut
        faulty.eval([token])
        if faulty.position <= stretch.first:
            plain.eval([token])
    plain.attention = Dense(window=64)
    expected = plain.eval(tokens[stretch.first : stretch.cause + 1])
    np.testing.assert_array_equal(logits, expected)
    assert state(guarded) == state(plain) != state(faulty)
    assert guarded.stats.pages_read
    assert 0 < (guarded.stats.layers[0].heads_local or 0) < 100
    assert guarded.stats.layers[1].heads_local == 0


def found_in(session: Session, pieces: Iterable[list[int]]) -> Tally:
    """What audits find while these are evaluated."""
    before = session.stats
    for piece in pieces:
        session.eval(piece)
    found = (session.stats - before).guard
    assert found
    return found


def test_control_brings_the_miss_rate_back(sharp: LLM) -> None:
    guard = Guard(audit_rate=1 / 8, promise=0.7, miss_target=0.05, control_period=64, lost_limit=0.3)
    guarded, tokens = sharp.session(n_ctx=2048, attention=BROKEN, guard=guard), ids(2000)
    early, late = (found_in(guarded, [part]) for part in (tokens[:500], tokens[500:]))
    assert early.miss_rates()[0][1].mean() > 0.1
    assert early.repairs > 0
    assert (late.miss_rates()[0].mean(axis=1) < 0.06).all()
    assert thresholds(guarded)[1, 0] > 0.05


def test_control_brings_a_damaged_sketch_back(sharp: LLM) -> None:
    guard = Guard(audit_rate=1 / 8, promise=0.7, miss_target=0.05, control_period=64, lost_limit=0.3)
    guarded, tokens = sharp.session(n_ctx=2048, attention=PAGED, guard=guard), ids(1200)
    guarded.eval(tokens[:600])
    mirror_sketch(guarded)
    early, late = (found_in(guarded, ([t] for t in part)) for part in (tokens[600:728], tokens[728:]))
    assert (early.page_miss_rate or 0) > 0.1
    assert 1 <= early.repairs <= 2  # at most one in a control period
    assert 0.04 < (late.page_miss_rate or 0) < 0.06
    assert late.repairs == 0


# ---- answers that are held back ----


def answer(session: Session, llm: LLM, prompt: list[int], n: int, **sampling: Any) -> list[TokenLogprob]:
    request = Request(Sampling(**{"temperature": 0.0, **sampling}), 1, n, logprobs=0)
    generation = VerifiedGeneration(session, llm.tokenizer, prompt, request, continuing=True)
    pieces = list(generation.pieces())
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason in ("length", "stop")
    return [entry for piece in pieces for entry in piece.logprobs]


def test_without_repairs_what_is_held_back_is_the_same_answer(sharp: LLM) -> None:
    guard = Guard(audit_rate=1 / 16, lost_limit=1)
    held = session(sharp, guard=guard)
    changes: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3, "stop": ["e"]}]
    for change in changes:
        options: dict[str, Any] = {"max_tokens": 60, "temperature": 0.0, **change}
        plain = sharp.generate(ids(300), session=session(sharp, guard=guard), **options)
        shown = sharp.generate(ids(300), session=held, hold_back=True, **options)
        assert shown["choices"] == plain["choices"]


def test_what_is_held_back_is_drawn_again_from_the_repaired_state(sharp: LLM) -> None:
    """Greedy tokens are the likeliest ones of a replay that is dense from the last clean audit on."""
    for seed in range(20):
        prompt = ids(100, seed)
        guarded = session(sharp, BROKEN, Guard(audit_rate=1 / 16, control_period=1024, lost_limit=0.6))
        shown = [entry.token for entry in answer(guarded, sharp, prompt, 200)]
        first = guarded.watch.last_repair.first if guarded.watch and guarded.watch.last_repair else 0
        if 100 < first < 100 + len(shown):
            break
    assert guarded.stats.guard
    assert guarded.stats.guard.repairs == 1
    replay = session(sharp, BROKEN, None)
    before = replay.eval([*prompt, *shown][:first], all_logits=True)
    replay.attention = Dense(window=64)
    after = replay.eval([*prompt, *shown][first:], all_logits=True)
    likeliest = np.concatenate([before, after]).argmax(axis=1)
    np.testing.assert_array_equal(likeliest[99:-1], shown)


def test_pieces_are_shown_when_an_audit_confirms_them(sharp: LLM) -> None:
    guarded = session(sharp, Adaptive(0.6, window=64), Guard(audit_rate=1 / 32, lost_limit=1))
    request = Request(Sampling(temperature=0.0), 1, 100)
    generation = VerifiedGeneration(guarded, sharp.tokenizer, ids(300), request, continuing=True)
    for i, _ in enumerate(generation.pieces()):
        assert guarded.watch
        assert guarded.watch.verified >= 300 + i
    assert i > 0


def test_hold_back_needs_a_guard_that_repairs(tiny: LLM) -> None:
    for guard in (None, Guard(repair=False)):
        with pytest.raises(ArgumentError, match="hold_back"):
            tiny.generate("a", hold_back=True, session=session(tiny, guard=guard))
    with pytest.raises(ArgumentError, match="no guard"):
        session(tiny, guard=None).verify()


def test_verify_audits_the_last_token(sharp: LLM) -> None:
    guard = Guard(audit_rate=1 / 1000, seed=1, lost_limit=0.5)
    whole, broken = session(sharp, guard=guard), session(sharp, BROKEN, guard)
    expected = whole.eval(ids(400))
    np.testing.assert_array_equal(whole.verify(), expected)
    assert whole.verify() is None
    broken.eval(ids(400))
    logits = broken.verify()
    assert broken.stats.guard
    assert broken.stats.guard.repairs == 1
    assert broken.stats.guard.audits == 0  # asked for, not drawn: no evidence of how often
    dense = session(sharp, Dense(window=64), None)
    np.testing.assert_array_equal(logits, dense.eval(ids(400)))
    assert broken.verify() is None


# ---- around it ----


def test_a_repair_that_is_stopped_leaves_what_was_verified(
    sharp: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = ids(700)
    guard = Guard(audit_rate=1 / 16, control_period=1024, lost_limit=0.6)
    guarded = session(sharp, BROKEN, guard)
    monkeypatch.setattr(Watch, "_set_dense", stopped)
    with pytest.raises(KeyboardInterrupt):
        guarded.eval(tokens)
    monkeypatch.undo()
    assert guarded.watch
    assert guarded.position == guarded.watch.verified
    logits = guarded.eval(tokens[guarded.position :])
    whole = session(sharp, BROKEN, guard)
    np.testing.assert_array_equal(logits, whole.eval(tokens))
    assert state(guarded) == state(whole)


def test_a_batch_that_was_stopped_at_its_end_is_not_forgotten(
    sharp: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = session(sharp, BROKEN)
    evaluate = guarded._native.eval

    def finished_then_stopped(*arguments: Any) -> None:
        evaluate(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(guarded._native, "eval", finished_then_stopped)
    with pytest.raises(KeyboardInterrupt):
        guarded.eval(ids(300))
    monkeypatch.undo()
    assert guarded.position == 0
    np.testing.assert_array_equal(guarded.eval(ids(300)), session(sharp, BROKEN).eval(ids(300)))


def stopped(*_: Any) -> None:
    raise KeyboardInterrupt


def test_logits_of_all_tokens_are_those_after_repair(sharp: LLM) -> None:
    tokens, guard = ids(600), Guard(audit_rate=1 / 16, control_period=1024, lost_limit=0.6)
    logits = session(sharp, BROKEN, guard).eval(tokens, all_logits=True)
    plain = session(sharp, BROKEN, None)
    guarded = session(sharp, BROKEN, guard)
    stretch, _ = repaired(guarded, tokens)
    before = plain.eval(tokens[: stretch.first], all_logits=True)
    plain.attention = Dense(window=64)
    after = plain.eval(tokens[stretch.first :], all_logits=True)
    np.testing.assert_array_equal(logits, np.concatenate([before, after]))


def test_another_policy_starts_control_over(sharp: LLM) -> None:
    guarded = session(sharp, BROKEN, Guard(audit_rate=1 / 8, control_period=64))
    guarded.eval(ids(400))
    assert guarded.watch
    assert guarded.watch.control.shift.any()
    guarded.attention = Dense(window=64)
    assert not guarded.watch.control.shift.any()
    before = guarded.stats
    guarded.eval(ids(200))
    assert (guarded.stats - before).guard.audits == 0  # type: ignore[union-attr]
    guarded.guard = None
    assert guarded.stats.guard is None
    guarded.eval([1])


def test_control_can_be_handed_on(sharp: LLM) -> None:
    first = session(sharp, BROKEN, Guard(audit_rate=1 / 8, control_period=64))
    first.eval(ids(600))
    assert first.watch
    second = session(sharp, BROKEN, Guard(start=first.watch.control))
    np.testing.assert_array_equal(thresholds(second), thresholds(first))
    with pytest.raises(ArgumentError, match="5 layers, but the model has 2"):
        session(sharp, guard=Guard(start=Control.none(5)))


def test_what_a_guard_refuses(tiny: LLM) -> None:
    guarded = session(tiny)
    with pytest.raises(ArgumentError, match="keeps its own"):
        guarded.eval([1], record=guarded.new_record(1))
    with pytest.raises(ArgumentError, match="expected a Guard"):
        guarded.guard = True  # type: ignore[assignment]


def test_answers_say_what_the_guard_found(sharp: LLM) -> None:
    guarded = session(sharp, BROKEN, Guard(audit_rate=1 / 16, lost_limit=0.5))
    found = sharp.generate(ids(400), max_tokens=5, session=guarded)["attention"]["guard"]
    assert found["audits"] > 0
    assert found["repairs"] > 0
    assert found["miss_rate"] > 0


# ---- the real model ----


@pytest.fixture(scope="module")
def real(default_model: Path) -> tuple[LLM, list[int]]:
    """The default model, and Python's language reference."""
    llm = LLM(default_model)
    return llm, texts.excerpt(llm, "prose", texts.builtin()["prose"], 3000, 0).tokens.tolist()


@pytest.mark.slow
def test_heads_that_never_look_back_on_the_real_model(real: tuple[LLM, list[int]]) -> None:
    """A third of the layers is local whatever comes: found, repaired as dense attention has it, and ended."""
    llm, tokens = real
    thresholds = np.full((llm.info.n_layers, llm.info.n_heads), 0.9)
    thresholds[10:20] = 0
    broken = Adaptive(thresholds, window=256)
    guard = Guard(audit_rate=1 / 16, control_period=128)
    once = llm.session(n_ctx=1024, attention=broken, guard=replace(guard, control_period=1024))
    stretch, logits = repaired(once, tokens[:1024])
    plain = llm.session(n_ctx=1024, attention=broken)
    plain.eval(tokens[: stretch.first])
    plain.attention = Dense(window=256)
    expected = plain.eval(tokens[stretch.first : stretch.cause + 1])
    np.testing.assert_array_equal(logits, expected)
    assert state(once) == state(plain)

    guarded = llm.session(n_ctx=2048, attention=broken, guard=replace(guard, lost_limit=0.35))
    found = [found_in(guarded, [part]) for part in (tokens[:600], tokens[600:1536], tokens[1536:2048])]
    early, late = (part.miss_rates()[0][10:20].mean() for part in (found[0], found[-1]))
    assert found[0].repairs > 0
    assert found[-1].repairs == 0
    assert early > 0.09
    assert late < 0.05


@pytest.mark.slow
def test_a_damaged_sketch_on_the_real_model(real: tuple[LLM, list[int]]) -> None:
    llm, tokens = real
    paged = Adaptive(1.5, window=256, page_bits=3)
    guard = Guard(audit_rate=1 / 8, control_period=64, lost_limit=0.18)
    guarded = llm.session(n_ctx=2048, attention=paged, guard=guard)
    healthy = found_in(guarded, [tokens[:1000]])
    mirror_sketch(guarded)
    found = [
        found_in(guarded, ([token] for token in part))
        for part in (tokens[1000:1064], tokens[1064:1192], tokens[1192:1320])
    ]
    assert healthy.repairs == 0
    assert 1 <= found[0].repairs <= 2  # at most one in a control period, of which these tokens touch two
    assert (found[0].page_miss_rate or 0) > 0.05
    assert (found[2].page_miss_rate or 0) < 0.05
    assert found[2].repairs == 0
