"""Parts of the guard by themselves: sampling, bounds, audits, sums, controller, timeline."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllm import Adaptive, ArgumentError, Dense, Window
from pyllm.guard import Guard
from pyllm.guard.audit import Audit, audits
from pyllm.guard.bounds import wilson
from pyllm.guard.controller import MARGIN, TIGHTEN, Control, Controller, logit
from pyllm.guard.sampling import audit_mask
from pyllm.guard.tally import EDGES, Tally
from pyllm.guard.timeline import Timeline
from pyllm.record import Record

N_LAYERS, N_HEADS = 3, 4
TARGET = 0.02

# ---- sampling ----


@given(st.integers(0, 5000), st.integers(1, 700), st.integers(1, 130), st.integers(-(2**63), 2**63))
def test_one_position_of_every_stratum_however_asked(first: int, n: int, interval: int, seed: int) -> None:
    whole = audit_mask(0, first + n + interval, interval, seed)
    strata = whole[: len(whole) // interval * interval].reshape(-1, interval)
    assert (strata.sum(axis=1) == 1).all()
    np.testing.assert_array_equal(audit_mask(first, first + n, interval, seed), whole[first : first + n])


def test_every_position_of_a_stratum_is_as_likely() -> None:
    at = np.flatnonzero(audit_mask(0, 64 * 20_000, 64, seed=0)) % 64
    counts = np.bincount(at, minlength=64)
    assert counts.min() > 0.75 * 20_000 / 64
    assert counts.max() < 1.25 * 20_000 / 64
    other = np.flatnonzero(audit_mask(0, 64 * 20_000, 64, seed=1)) % 64
    assert 0.5 / 64 < np.mean(at == other) < 2 / 64


# ---- bounds ----


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_wilson_is_where_the_score_test_just_passes(n: int, rate: float) -> None:
    low, high = wilson(rate * n, n)
    assert 0 <= low <= rate + 1e-9
    assert rate - 1e-9 <= high <= 1
    for end in (float(low), float(high)):
        if 1e-12 < end < 1 - 1e-12:
            z = abs(rate - end) / math.sqrt(end * (1 - end) / n)
            assert z == pytest.approx(1.959964, rel=1e-3)


def test_wilson_without_draws_is_nothing() -> None:
    low, high = wilson([0, 1], [0, 1])
    assert np.isnan(low[0])
    assert np.isnan(high[0])
    assert high[1] == 1


# ---- audits and their sums ----


def record_of(rng: np.random.Generator, n: int = 6) -> Record:
    """Masses as attention makes them: a long head read some of the bulk, the last one all of it."""
    record = Record.empty(N_LAYERS, N_HEADS, np.arange(n) % 2 == 0)
    shape = record.is_long.shape
    record.local_mass[:], record.true_mass[:] = rng.normal(0, 3, (2, *shape))
    record.is_long[:] = rng.random(shape) < 0.5
    read = np.logaddexp(record.local_mass, record.true_mass + np.log(rng.random(shape)))
    record.read_mass[:] = np.where(record.is_long, read, record.local_mass)
    record.true_mass[:, ~record.audit] = np.nan
    record.true_mass[:, 4] = np.nan  # audited, but without a bulk
    return record


def test_audits_say_who_broke_the_promise(rng: np.random.Generator) -> None:
    record = record_of(rng)
    found = audits(record, 100, promise=0.9)
    assert [audit.position for audit in found] == [100, 102]
    for audit in found:
        i = audit.position - 100
        masses = (record.local_mass, record.true_mass, record.read_mass)
        local, bulk, read = (np.exp(mass[:, i].astype(float)) for mass in masses)
        lost = 1 - read / (local + bulk)
        np.testing.assert_array_equal(audit.local, ~record.is_long[:, i])
        np.testing.assert_allclose(audit.lost, lost, atol=1e-4)
        sure = abs(lost - 0.1) > 1e-4
        assert (audit.missed == (audit.local & (local / (local + bulk) < 0.9)))[sure].all()
        assert (audit.page_missed == (~audit.local & (read / (local + bulk) < 0.9)))[sure].all()
        assert audit.worst == pytest.approx(lost.mean(axis=1).max(), abs=1e-4)


def random_audits(rng: np.random.Generator, n: int) -> list[Audit]:
    lost = rng.random((n, N_LAYERS, N_HEADS)).astype(np.float32) ** 4
    local = rng.random(lost.shape) < 0.5
    return [
        Audit(i, local[i], local[i] & (lost[i] > 0.1), ~local[i] & (lost[i] > 0.1), lost[i]) for i in range(n)
    ]


def test_a_tally_is_the_sums_of_its_audits(rng: np.random.Generator) -> None:
    found = random_audits(rng, 50)
    tally = Tally.empty(N_LAYERS, N_HEADS)
    assert (tally.miss_rate, tally.lost_share) == (None, None)
    for i, audit in enumerate(found):
        if i == 20:
            before = tally
        tally = tally.with_audit(audit, over_limit=i % 10 == 0)
    tally = tally.with_repair(64)
    missed, lost = np.array([a.missed for a in found]), np.array([a.lost for a in found])
    assert (tally.audits, tally.over_limit, tally.repairs, tally.repaired_tokens) == (50, 5, 1, 64)
    assert tally.miss_rate == pytest.approx(missed.mean())
    assert tally.lost_share == pytest.approx(lost.mean())
    rate, low, high = tally.miss_rates()
    np.testing.assert_allclose(rate, missed.mean(axis=0))
    assert (low <= rate).all()
    assert (rate <= high).all()
    late = tally - before
    assert (late.audits, late.over_limit, late.repairs) == (30, 3, 1)
    np.testing.assert_array_equal(late.missed, missed[20:].sum(axis=0))
    np.testing.assert_allclose(late.lost_means()[0], lost[20:].mean(axis=0), rtol=1e-5)


def test_quantiles_are_the_class_above_the_exact_one(rng: np.random.Generator) -> None:
    found = random_audits(rng, 400)
    tally = Tally.empty(N_LAYERS, N_HEADS)
    for audit in found:
        tally = tally.with_audit(audit, False)
    exact = np.quantile([a.lost for a in found], 0.99, axis=0, method="inverted_cdf")
    value, low, high = tally.lost_quantiles()
    np.testing.assert_array_equal(value, EDGES[np.searchsorted(EDGES, exact)])
    assert (low <= value).all()
    assert (value <= high).all()
    assert np.isnan(Tally.empty(1, 1).lost_quantiles()[0]).all()


# ---- controller ----


def controller(policy: Adaptive | Dense | Window, target: float = TARGET, limit: float = 1.0) -> Controller:
    return Controller(policy, N_LAYERS, N_HEADS, target, limit)


def audit_with(missed: float, page_missed: float = 0.0) -> Audit:
    """The first part of all heads missed."""
    order = np.arange(N_LAYERS * N_HEADS).reshape(N_HEADS, N_LAYERS).T / (N_LAYERS * N_HEADS)
    zero = np.zeros((N_LAYERS, N_HEADS))
    return Audit(0, zero == 0, order < missed, order < page_missed, zero.astype(np.float32))


def test_no_shift_is_the_policy_itself(rng: np.random.Generator) -> None:
    for tau in (0.0, 0.99999, 1.5, rng.random((N_LAYERS, N_HEADS))):
        policy = Adaptive(tau, page_bits=3, page_share=0.01)
        native = controller(policy).native(Control.none(N_LAYERS))
        expected = policy.native(N_LAYERS, N_HEADS)
        np.testing.assert_array_equal(native.pop("thresholds"), expected.pop("thresholds"))
        assert native == expected


def test_the_step_is_the_formula() -> None:
    policy = controller(Adaptive(0.9, page_bits=3))
    control = policy.step(Control.none(N_LAYERS), [audit_with(0.5), audit_with(0.0, page_missed=1.0)])
    eta = 0.25 / TARGET
    np.testing.assert_allclose(control.shift, eta * (0.25 - TARGET))
    margin = logit(policy.native(control)["thresholds"], -9, 9)
    np.testing.assert_allclose(margin, math.log(9) + eta * (0.25 - TARGET), atol=1e-4)
    assert control.page_shift == pytest.approx(-eta * (0.5 - TARGET))
    share = policy.native(control)["page_share"]
    assert math.log(share / (1 - share)) == pytest.approx(math.log(0.005 / 0.995) + control.page_shift)


def test_both_page_shares_move_together() -> None:
    policy = controller(Dense(page_bits=3, page_share=0.01, decode_share=0.002))
    control = policy.step(Control.none(N_LAYERS), [audit_with(0.0, page_missed=0.05)])
    assert control.page_shift < 0
    native = policy.native(control)
    for name, share in (("page_share", 0.01), ("decode_share", 0.002)):
        moved = math.log(native[name] / (1 - native[name]))
        assert moved == pytest.approx(math.log(share / (1 - share)) + control.page_shift)
    strict, loose = (policy.native(control) for control in ends(policy))
    assert strict["page_bits"] == 0
    assert (loose["page_share"], loose["decode_share"]) == (0.01, 0.002)


def ends(policy: Controller) -> tuple[Control, Control]:
    """Where nothing but misses leads to, and none."""
    strict = loose = Control.none(N_LAYERS)
    for _ in range(200):
        strict = policy.step(strict, [audit_with(1.0, page_missed=1.0)])
        loose = policy.step(loose, [audit_with(0.0)])
    return strict, loose


def test_the_ends_are_everything_and_nothing() -> None:
    policy = controller(Adaptive(np.linspace(0, 1, 12).reshape(N_LAYERS, N_HEADS), page_bits=2))
    strict, loose = ends(policy)
    assert (policy.native(strict)["thresholds"] > 1).all()
    assert (policy.native(strict)["page_bits"], policy.native(loose)["page_bits"]) == (0, 2)
    assert (policy.native(loose)["thresholds"] == 0).all()
    assert loose.page_shift == 0  # a page share is never looser than the policy's
    # No farther than the ends: one way back is not longer than the range.
    assert np.ptp([strict.shift, loose.shift]) <= 4 * MARGIN


def test_heads_that_never_are_local_stay_so() -> None:
    """Beside some that may be; where none may, the threshold is a start like any other."""
    thresholds = np.full((N_LAYERS, N_HEADS), 0.9)
    thresholds[1], thresholds[2, 0] = 2.0, 1.5
    policy = controller(Adaptive(thresholds))
    strict, loose = ends(policy)
    assert strict.shift[1] == loose.shift[1] == 0
    for control, expected in ((strict, 2), (loose, 0)):
        found = policy.native(control)["thresholds"]
        np.testing.assert_array_equal(found[0], expected)
        np.testing.assert_array_equal(found[1], 2)
        np.testing.assert_array_equal(found[2], [1.5, *[expected] * (N_HEADS - 1)])
    # A layer's way back is no longer for a head that never moves.
    assert strict.shift[2] == strict.shift[0]
    everywhere = controller(Adaptive([2.0, 1.5, 3.0]))
    assert (everywhere.native(ends(everywhere)[1])["thresholds"] == 0).all()


def test_what_a_repair_finds_at_fault_is_tightened() -> None:
    local = np.zeros((N_LAYERS, N_HEADS), bool)
    local[1] = True
    lost = np.where(local, 0.8, 0.0).astype(np.float32)
    nothing = np.zeros_like(local)
    policy = controller(Adaptive(0.9, page_bits=3), limit=0.5)
    start = Control(np.zeros(N_LAYERS), -2.0)
    usual = policy.step(start, [Audit(0, local, nothing, nothing, 0 * lost)])
    after = policy.step(start, [Audit(0, local, nothing, nothing, lost)])
    np.testing.assert_allclose(after.shift - usual.shift, [0, TIGHTEN, 0])
    assert after.page_shift == usual.page_shift
    paged = policy.step(start, [Audit(0, ~local, nothing, nothing, lost[[1, 1, 1]])])
    assert paged.page_shift == pytest.approx(usual.page_shift - TIGHTEN)


@pytest.mark.parametrize("policy", [Dense(), Window()])
def test_nothing_moves_without_thresholds(policy: Dense | Window) -> None:
    control = controller(policy).step(Control.none(N_LAYERS), [audit_with(1.0, 1.0)])
    assert not control.shift.any()
    assert control.page_shift == 0
    assert controller(policy).native(control) == policy.native(N_LAYERS, N_HEADS)


class Attention:
    """Margins L − M of heads that differ, drift from text to text, and are seen with a biased, noisy
    estimate.
    """

    def __init__(self, seed: int, n_layers: int, n_heads: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.mean = self.rng.normal(2.0, 2.5, (n_layers, n_heads))
        self.bias = self.rng.normal(-1.0, 1.5, (n_layers, n_heads))
        self.noise = self.rng.uniform(0.3, 2.0, (n_layers, n_heads))

    def audit(self, position: int, thresholds: np.ndarray, promise: float) -> Audit:
        text = 1.5 * math.sin(position / 3000)
        shape = self.mean.shape
        true = self.mean + text + self.rng.normal(0, 1.0, (shape[0], 1)) + self.rng.normal(0, 2.0, shape)
        seen = true + self.bias + self.rng.normal(0, 1.0, shape) * self.noise
        local = 1 / (1 + np.exp(-seen)) >= thresholds
        lost = np.where(local, 1 / (1 + np.exp(true)), 0)
        return Audit(position, local, local & (lost > 1 - promise), np.zeros(shape, bool), lost.astype("f4"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("target", [0.01, 0.02, 0.05, 0.1])
@pytest.mark.parametrize("start", [0.0, 0.5, 0.9, 2.0])
def test_any_start_converges(seed: int, target: float, start: float) -> None:
    """20,000 tokens, audits and period as by default: the second half is within 20 % of the target."""
    n_layers, n_heads, guard = 12, 9, Guard(miss_target=target)
    policy = Controller(Adaptive(start), n_layers, n_heads, target, 1.0)
    attention, control = Attention(seed, n_layers, n_heads), Control.none(n_layers)
    rates = []
    for position in range(0, 20_000, guard.control_period):
        thresholds = policy.native(control)["thresholds"]
        mask = audit_mask(position, position + guard.control_period, guard.interval, seed)
        found = [attention.audit(position + int(i), thresholds, 0.9) for i in np.flatnonzero(mask)]
        rates.append(np.mean([audit.missed.mean() for audit in found]))
        control = policy.step(control, found)
    late = np.mean(rates[len(rates) // 2 :])
    assert abs(late / target - 1) < 0.2, late


# ---- timeline ----


def timeline() -> Timeline:
    return Timeline(256, 0, 100, Control.none(1), lost_limit=0.5)


def audit_at(position: int, lost: float = 0.0) -> Audit:
    one = np.ones((1, 1))
    return Audit(position, one > 0, one < 0, one < 0, (lost * one).astype(np.float32))


def step_counting(control: Control, found: object) -> Control:
    return Control(control.shift + 1)


def test_control_moves_at_period_boundaries_only() -> None:
    line = timeline()
    line.audits.append(audit_at(150))
    for position in range(1024):
        line.advance(position, step_counting)
        line.advance(position, step_counting)  # asking twice changes nothing
        assert line.control.shift[0] == (position >= 256)
    line.audits.append(audit_at(1000))
    line.advance(1024, step_counting)
    assert line.control.shift[0] == 2
    assert line.rewind(1024) == 1024
    assert line.control.shift[0] == 2
    assert line.rewind(1010) == 1010
    line.advance(1024, step_counting)
    assert line.control.shift[0] == 2
    assert line.rewind(1000) == 1000
    line.advance(1024, step_counting)
    assert line.control.shift[0] == 1
    assert line.rewind(200) == 200
    assert line.control.shift[0] == 0


def test_a_repair_reaches_from_the_last_clean_audit_to_the_boundary() -> None:
    line = timeline()
    assert line.clean == 100
    line.audits += [audit_at(130), audit_at(200), audit_at(290, lost=0.7)]
    assert line.clean == 201
    stretch = line.repair(290)
    assert (stretch.first, stretch.stop) == (201, 512)
    assert line.clean == 512
    assert line.is_dense(511)
    assert not line.is_dense(512)
    # The cause stands: so does what it did.
    assert line.rewind(300) == 300
    assert line.is_dense(300)
    # The cause is forgotten: a new session would not have made these tokens dense.
    assert line.rewind(250) == 201
    assert not line.is_dense(250)
    assert [audit.position for audit in line.audits] == [130, 200]
    assert line.clean == 201


def test_a_pinned_repair_outlives_its_cause() -> None:
    line = timeline()
    line.audits += [audit_at(130), audit_at(290, lost=0.7)]
    line.repair(290)
    assert line.pin().first == 131
    assert line.rewind(131) == 131
    assert line.is_dense(131)
    assert line.rewind(120) == 120
    assert not line.is_dense(131)


# ---- settings ----


@pytest.mark.parametrize(
    "wrong",
    [
        {"audit_rate": 0},
        {"audit_rate": 1.5},
        {"audit_rate": True},
        {"promise": 1},
        {"miss_target": 0},
        {"miss_target": float("nan")},
        {"lost_limit": -0.1},
        {"control_period": 100},
        {"control_period": 0},
        {"log_bytes": 10},
        {"seed": 0.5},
    ],
)
def test_settings_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        Guard(**wrong)  # type: ignore[arg-type]
