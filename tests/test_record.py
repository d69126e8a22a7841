"""The decision record: against numpy, against itself however a prompt is cut; and that it changes nothing."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyllm import LLM, Adaptive, ArgumentError, ContextError, Dense, Oracle, Static, Window
from pyllm.attention import Policy
from pyllm.record import Record
from pyllm.reference import attention as reference
from test_attention import SEEDS, Result, assert_same, policies, random_inputs, run, shapes, with_arrays
from test_linear import ISAS, products
from test_pages import paged
from tiny_models import write_tiny

CHUNKS = (1, 7, 64, 512)
MASSES = ("local_mass", "estimate", "true_mass", "read_mass", "mean_score", "deviation")


def audits(seed: int, n: int) -> NDArray[np.bool_]:
    """From no query to every one."""
    rng = np.random.default_rng(seed + 1)
    return np.asarray(rng.random(n) < rng.choice([0.0, 0.1, 0.5, 1.0]))


def assert_record(
    ours: Result, theirs: reference.Decisions, policy: reference.Policy, audit: NDArray[np.bool_]
) -> None:
    """What is recorded is what numpy finds, and nothing where there is none."""
    record, bulk = ours.record, theirs.has_bulk
    finite = np.abs(theirs.bulk_mass_true[bulk]).max(initial=np.abs(theirs.local_mass).max())
    tolerance = 2e-5 * (1 + finite)

    assert np.array_equal(record["is_long"] == 1, ours.is_long)
    assert np.array_equal(record["local_mass"], ours.local_mass)
    if policy.kind in ("adaptive", "oracle"):
        assert np.array_equal(record["estimate"][bulk], ours.bulk_mass[bulk])
        assert np.isnan(record["estimate"][~bulk]).all()
    else:
        assert np.isnan(record["estimate"]).all()
    for name in ("mean_score", "deviation"):
        seen = bulk if policy.kind == "adaptive" else np.zeros_like(bulk)
        assert np.allclose(record[name][seen], getattr(theirs, name)[seen], atol=tolerance, rtol=1e-3), name
        assert np.isnan(record[name][~seen]).all()
    known = bulk & audit
    assert np.allclose(record["true_mass"][known], theirs.bulk_mass_true[known], atol=tolerance, rtol=0)
    assert np.isnan(record["true_mass"][~known]).all()
    # What a long head without page tier reads is everything, what a local one reads is its local part.
    read_mass = record["read_mass"]
    assert np.array_equal(read_mass[~ours.is_long], record["local_mass"][~ours.is_long])
    whole = np.logaddexp(theirs.local_mass, theirs.bulk_mass_true)
    assert (read_mass <= whole + tolerance).all()
    assert (read_mass >= record["local_mass"] - tolerance).all()
    if not policy.page_bits:
        assert np.allclose(read_mass[ours.is_long], whole[ours.is_long], atol=tolerance, rtol=0)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=12, deadline=None)
@given(
    seed=SEEDS,
    shape=shapes,
    policy=policies | paged,
    n=st.integers(1, 450),
    chunk=st.sampled_from(CHUNKS),
)
def test_reference(
    isa: str, seed: int, shape: tuple[int, int, int], policy: reference.Policy, n: int, chunk: int
) -> None:
    n = n if chunk > 1 else min(n, 200)
    x, audit = random_inputs(seed, n, *shape), audits(seed, n)
    policy = with_arrays(policy, shape, seed)
    ours = run(x, policy, isa, chunk=min(chunk, n), audit=audit)
    theirs = reference.attend(x.q, x.k, x.v, x.scale, policy, chunk=chunk, products=products(isa)).decisions
    assert_record(ours, theirs, policy, audit)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, shape=shapes, policy=policies | paged, n=st.integers(65, 500), n_threads=st.integers(1, 4))
def test_recording_changes_nothing(
    isa: str, seed: int, shape: tuple[int, int, int], policy: reference.Policy, n: int, n_threads: int
) -> None:
    x = random_inputs(seed, n, *shape)
    policy = with_arrays(policy, shape, seed)
    for chunk in (1, 7, n):
        plain = run(x, policy, isa, n_threads, chunk)
        assert_same(plain, run(x, policy, isa, n_threads, chunk, audit=audits(seed, n)))


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, shape=shapes, policy=policies, n=st.integers(65, 500), n_threads=st.integers(2, 4))
def test_chunks_and_threads_change_nothing(
    isa: str, seed: int, shape: tuple[int, int, int], policy: reference.Policy, n: int, n_threads: int
) -> None:
    """Without page tier every mass is the same, to the last bit, however the prompt is cut."""
    x, audit = random_inputs(seed, n, *shape), audits(seed, n)
    policy = with_arrays(policy, shape, seed)
    whole = run(x, policy, isa, chunk=n, audit=audit).record
    for chunk, threads in ((1, n_threads), (7, 1), (64, n_threads), (512, 1)):
        cut = run(x, policy, isa, threads, min(chunk, n), audit).record
        for name, values in whole.items():
            assert np.array_equal(values, cut[name], equal_nan=name != "is_long"), name


@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, shape=shapes, policy=paged, n=st.integers(200, 500))
def test_true_masses_do_not_depend_on_what_pages_were_read(
    seed: int, shape: tuple[int, int, int], policy: reference.Policy, n: int
) -> None:
    x = random_inputs(seed, n, *shape)
    policy = with_arrays(policy, shape, seed)
    every = np.ones(n, bool)
    dense = replace(policy, kind="dense", page_bits=0, page_rest=0.0)
    truth = run(x, dense, chunk=n, audit=every).record["true_mass"]
    for chunk in (1, 64, n):
        found = run(x, policy, chunk=chunk, audit=every).record["true_mass"]
        assert np.array_equal(found, truth, equal_nan=True)


# ---- through a session ----

POLICIES = (
    Dense(window=64),
    Window(window=64),
    Static([[1, 0] * 4, [0, 1] * 4], window=64),
    Oracle(0.7, window=64),
    Adaptive(0.6, window=64, granularity="head"),
    Adaptive(0.6, window=64),
    Adaptive(0.6, window=64, page_bits=3, page_share=0.02),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("record")
    return write_tiny(folder / "tiny.gguf", dim=64, n_ff=96, sharp=12.0, tokenizer=True)


def tokens(rng: np.random.Generator, n: int) -> list[int]:
    return [int(i) for i in rng.integers(0, 300, n)]


def equal(a: Record, b: Record) -> bool:
    return all(
        np.array_equal(getattr(a, f.name), getattr(b, f.name), equal_nan=f.name in MASSES) for f in fields(a)
    )


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_logits_are_the_same_and_batches_make_one_record(
    model: Path, policy: Policy, rng: np.random.Generator
) -> None:
    ids, audit = tokens(rng, 300), rng.random(300) < 0.3
    records = []
    for n_batch in (1, 7, 64, 512):
        llm = LLM(model, n_batch=n_batch, n_threads=2, attention=policy)
        plain = llm.session().eval(ids, all_logits=True)
        session = llm.session()
        record = session.new_record(300, audit)
        assert np.array_equal(session.eval(ids, all_logits=True, record=record), plain)
        records.append(record)
    if not getattr(policy, "page_bits", 0):
        assert all(equal(records[0], record) for record in records[1:])
    last = records[-1]
    assert last.local_mass.shape == (2, 300, 8)
    assert np.isfinite(last.local_mass).all()
    assert np.isfinite(last.read_mass).all()
    has_bulk = np.arange(300) + 1 >= 64 + 16 + 64
    assert np.array_equal(np.isfinite(last.true_mass).all(axis=(0, 2)), has_bulk & audit)
    estimated = has_bulk if isinstance(policy, Oracle | Adaptive) else np.zeros(300, bool)
    assert np.array_equal(np.isfinite(last.estimate).all(axis=(0, 2)), estimated)
    local = (session.stats.heads_local or 0) / 100
    assert np.isclose(1 - last.is_long[:, has_bulk].mean(), local)


def test_lost_share(model: Path, rng: np.random.Generator) -> None:
    """Dense attention loses nothing, a window everything outside of it."""
    ids = tokens(rng, 250)
    for policy in (Dense(window=64), Window(window=64)):
        session = LLM(model, attention=policy).session()
        record = session.new_record(250, audit=True)
        session.eval(ids, record=record)
        lost = record.lost_share
        assert np.isnan(lost[:, : 16 + 64 + 63]).all()
        share = 1 / (1 + np.exp((record.local_mass - record.true_mass).astype(np.float64)))
        expected = share if isinstance(policy, Window) else np.zeros_like(share)
        bulk = np.isfinite(record.true_mass)
        np.testing.assert_allclose(lost[bulk], expected[bulk], atol=1e-5)
        assert (lost[bulk] >= 0).all()
        assert (lost[bulk] <= 1).all()


def test_decode_and_prefill_record_the_same(model: Path, rng: np.random.Generator) -> None:
    ids = tokens(rng, 220)
    llm = LLM(model, attention=Adaptive(0.6, window=64))
    whole, session = llm.session(), llm.session()
    record = whole.new_record(220, audit=True)
    whole.eval(ids, record=record)
    session.eval(ids[:200])
    for at in range(200, 220):
        one = session.new_record(1, audit=True)
        session.eval([ids[at]], record=one)
        for name in (*MASSES, "is_long"):
            assert np.array_equal(getattr(one, name)[:, 0], getattr(record, name)[:, at])


def test_audit_has_its_own_stage(model: Path, rng: np.random.Generator) -> None:
    session = LLM(model, attention=Adaptive(0.6, window=64)).session()

    def calls() -> int:
        return {name: calls for name, calls, _, _ in session._native.stage_stats()}["audit"]

    session.eval(tokens(rng, 200))
    assert calls() == 0
    session.eval(tokens(rng, 10), record=session.new_record(10, audit=True))
    assert calls() == 2  # layers


def test_wrong_records_evaluate_nothing(model: Path, rng: np.random.Generator) -> None:
    session = LLM(model).session(n_ctx=100)
    with pytest.raises(ArgumentError, match=r"record: shape \(2, 9, 8\).*\(2, 10, 8\)"):
        session.eval(tokens(rng, 10), record=session.new_record(9))
    wrong: Any
    for wrong in ([True, False], np.ones((10, 1))):
        with pytest.raises(ArgumentError, match="audit"):
            session.new_record(10, wrong)
    record = session.new_record(101, audit=True)
    with pytest.raises(ContextError):
        session.eval(tokens(rng, 101), record=record)
    assert np.isnan(record.local_mass).all()
    assert session.position == 0


def test_arrays_that_do_not_fit_are_named(model: Path, rng: np.random.Generator) -> None:
    """The library writes as many values as the model has, so every array is checked; nothing is evaluated."""
    session = LLM(model).session(n_ctx=100)
    ids, good = tokens(rng, 10), session.new_record(10, audit=True, queries=True)
    masses = np.empty((2, 10, 8), np.float32)
    wrong: dict[str, list[NDArray[Any]]] = {
        "audit": [np.ones(9, bool), np.ones(10, np.uint8)],
        "queries": [np.empty((2, 10, 8, 1), np.float32), masses],
        "is_long": [masses],
    }
    for name in MASSES:
        wrong[name] = [masses[:, :9], masses[:1], masses[:, :, :7], masses.astype(np.float64)]
    for name, arrays in wrong.items():
        for array in arrays:
            record = replace(good, **{name: array})
            with pytest.raises(ArgumentError, match=f"^record: ({name} of )?shape"):
                session.eval(ids, record=record)
            with pytest.raises(ArgumentError, match=f"^record: {name} of shape"):
                session._native.eval(np.array(ids, np.int32), np.empty((0, 320), np.float32), record)
    for name in ("local_mass", "queries"):
        record = replace(good, **{name: np.asfortranarray(getattr(good, name))})
        with pytest.raises(ArgumentError, match=f"^record: {name} is not contiguous"):
            session._native.eval(np.array(ids, np.int32), np.empty((0, 320), np.float32), record)
    assert session.position == 0
    session.eval(ids, record=good)
    assert good.queries is not None
    assert np.isfinite(good.queries).all()
