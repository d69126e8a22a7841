"""`pyllm calibrate`: parts that share no text, a search with known answers, the command from end to end."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllm import LLM, Adaptive, ArgumentError, Dense
from pyllm.attention import PRESETS, PageBits, Policy
from pyllm.calibration import Calibration
from pyllm.cli import main
from pyllm.cli.calibrate import on_answers, over_budget
from pyllm.evaluate import texts
from pyllm.evaluate.calibrate import BUDGETS, Plan, calibrate
from pyllm.evaluate.curves import Bands, Curve, Pages
from pyllm.evaluate.parts import deal
from pyllm.evaluate.search import BANDS, OWN, PAGE_BITS, PAGE_SHARES, TRACE, Search, Trial, bands, most
from pyllm.evaluate.texts import Text
from pyllm.profile import DECODE_PART, Measured, Profile, beside
from test_profile import profile_of

# ---- parts ----


def numbered(sizes: Sequence[int]) -> dict[str, list[int]]:
    """Documents of these sizes, in which every token is another one."""
    stops = np.cumsum([0, *sizes]).tolist()
    return {f"d{at}": list(range(stops[at], stops[at + 1])) for at in range(len(sizes))}


@given(
    sizes=st.lists(st.integers(0, 900), min_size=1, max_size=8),
    start=st.sampled_from([[], [10**6]]),
    n_parts=st.integers(1, 4),
    n_ctx=st.integers(20, 300),
    limit=st.integers(20, 900),
)
def test_parts_share_no_text(
    sizes: list[int], start: list[int], n_parts: int, n_ctx: int, limit: int
) -> None:
    parts = deal(numbered(sizes), start, n_parts, n_ctx=n_ctx, limit=limit, least=10)
    assert len(parts) == n_parts
    seen: list[int] = []
    for part in parts:
        assert sum(len(text.tokens) for text in part) <= limit
        for text in part:
            assert 10 <= len(text.tokens) <= n_ctx
            assert text.tokens[: len(start)].tolist() == start
            seen += text.tokens[len(start) :].tolist()
    assert len(seen) == len(set(seen))
    counts = [len(part) for part in parts]
    assert max(counts) - min(counts) <= 1
    if sum(sizes) >= 2 * n_parts * n_ctx:
        assert min(counts) >= 1


def names(parts: list[list[Text]]) -> list[set[str]]:
    return [{text.name.split("[")[0] for text in part} for part in parts]


def test_every_part_has_of_every_document() -> None:
    parts = deal(numbered([3000, 900, 400]), [], 3, n_ctx=100, limit=400, least=50)
    assert [len(part) for part in parts] == [4, 4, 4]
    assert names(parts) == [{"d0", "d1", "d2"}] * 3
    # Blocks of a long document come from all of it.
    places = [int(text.tokens[0]) for part in parts for text in part if text.name.startswith("d0")]
    assert max(places) - min(places) > 1500


def test_short_documents_are_joined() -> None:
    parts = deal(numbered([40] * 30), [], 3, n_ctx=100, limit=400, least=60)
    assert [len(part) for part in parts] == [4, 4, 4]
    assert names(parts) == [{"rest"}] * 3
    assert deal(numbered([40, 30]), [], 3, n_ctx=100, limit=400, least=60) == [[], [], []]
    # One document that is just enough is cut into as many blocks as there are parts.
    assert [
        [len(text.tokens) for text in part]
        for part in deal(numbered([270]), [], 3, n_ctx=100, limit=100, least=60)
    ] == [[90]] * 3


# ---- predictions ----


@given(
    a=st.floats(0.01, 10),
    b=st.floats(0.3, 3),
    c=st.floats(0.1, 5),
    d=st.floats(0.1, 1),
    share=st.floats(1e-4, 0.9),
)
def test_curves_of_powers_are_exact(a: float, b: float, c: float, d: float, share: float) -> None:
    points = {x: (a * x**b, c * x**-d) for x in (0.002, 0.01, 0.03, 0.05)}
    curve = Curve.of(points)
    assert curve.cost(share) == pytest.approx(c * share**-d, rel=1e-3)
    assert curve.share(a * share**b) == pytest.approx(share, rel=6e-3)  # of three digits
    for x, (loss, cost) in points.items():
        assert curve.share(loss) == pytest.approx(x, rel=6e-3)
        assert curve.cost(x) == pytest.approx(cost)


@given(
    st.dictionaries(
        st.integers(1, 500).map(lambda n: n / 1000),
        st.tuples(st.floats(1e-6, 10), st.floats(1e-3, 100)),
        min_size=2,
    ),
    st.floats(1e-9, 1e9),
)
def test_curves_of_anything_give_shares(points: dict[float, tuple[float, float]], loss: float) -> None:
    curve = Curve.of(points)
    share = curve.share(loss)
    assert 0 < share <= 1
    assert curve.cost(share) >= 0


def test_curves_of_noise_rise_and_fall() -> None:
    curve = Curve.of({0.01: (0.3, 20.0), 0.02: (0.2, 25.0), 0.04: (0.5, 5.0)})
    assert curve.share(0.29) < 0.01 <= curve.share(0.3) <= 0.02 < curve.share(0.31)
    assert curve.cost(0.02) == pytest.approx(20)
    assert 0.02 <= curve.share(0.4) <= 0.04


def test_prefill_and_decode_have_shares_of_their_own() -> None:
    prefill, decode = (
        Curve.of({x: (factor * x, 1 / x) for x in (0.001, 0.01, 0.1)}) for factor in (1.0, 5.0)
    )
    pages = Pages(3, prefill, decode)
    shares = (pages.prefill.share(0.02), pages.decode.share(0.02))
    assert shares == pytest.approx((0.02, 0.004), rel=1e-2)
    assert [prefill.share(0.001), decode.share(0.05)] == pytest.approx([0.001, 0.01], rel=1e-2)
    assert pages.cost(shares) == pytest.approx((50 + 250) / 2, rel=1e-2)


@given(
    st.lists(
        st.tuples(st.floats(1e-6, 1), st.integers(-10, 100).map(lambda n: n / 1000)), min_size=1, max_size=12
    ),
    st.floats(-1, 3),
)
def test_bands_that_keep_to_a_budget(pairs: list[tuple[float, float]], budget: float) -> None:
    loss, saved = np.array(pairs).T
    chosen, together = Bands(loss, saved).chosen(budget)
    assert loss[chosen].sum() <= max(budget, 0) + 1e-9
    assert (saved[chosen] > 0).all()
    assert together == pytest.approx(saved[chosen].sum())
    if budget >= loss.sum():
        assert chosen == np.flatnonzero(saved > 0).tolist()


# ---- the search ----

N_LAYERS = 6
GATE_LOSS = np.array([4, 1, 0.01, 0.02, 3, 2]) * 1e-3  # nats, of a gate in each layer
GATE_SAVES = 0.6  # of a layer's cost
# Factor on the loss, cost of the sketch in %.
BITS: dict[PageBits, tuple[float, float]] = {"graded": (1.3, 7.0), 3: (1.0, 12.0)}
SOME = Calibration(
    np.zeros((1, 1, 3)),
    np.zeros((1, 1, 1)),
    np.zeros((1, 1, 1, 1)),
    np.zeros((1, 1, 1)),
    np.zeros((1, 1, 1)),
    np.zeros((1, 1, 1)),
    (0, 1),
)
READ = 1.5  # % of the cost, at a share of 1


def world(policy: Policy, share: float | None, gates_lose: float = 1.0) -> tuple[float, float]:
    """(loss, cost) of policies with this share in a world where losses add up."""
    assert isinstance(policy, (Dense, Adaptive))
    loss, cost = 0.0, 100.0
    if policy.page_bits and share:
        factor, sketch = BITS[policy.page_bits]
        loss, cost = factor * share, sketch + READ * share**-0.4
    if isinstance(policy, Adaptive):
        on = np.broadcast_to(np.asarray(policy.threshold), N_LAYERS) <= 1
        strict = 1 - np.broadcast_to(np.asarray(policy.threshold), N_LAYERS)
        loss += gates_lose * float((GATE_LOSS * on * strict / 0.05).sum())
        cost *= 1 - GATE_SAVES * float(on.mean())
    return loss, min(cost, 100.0)


def measured(prefill: tuple[float, float], decode: tuple[float, float]) -> Measured:
    """Of the loss and the cost of both."""
    loss, work = prefill
    decode_loss, read = decode
    return Measured(1000, loss, loss, loss, 99.0, work, 100, decode_loss, decode_loss, decode_loss, read)


def times(m: Measured, factor: float, more: float = 0.0) -> Measured:
    """With other losses."""
    return measured((factor * m.kl + more, m.bulk_work), (factor * m.decode_kl + more, m.bulk_read))


class World:
    """Measures, and counts how often."""

    def __init__(self, gates_lose: float = 1.0, trace: float = TRACE) -> None:
        self.gates_lose, self.trace = gates_lose, trace
        self.asked: list[Policy] = []

    def measure(self, policies: Sequence[Policy]) -> list[Measured]:
        self.asked += policies
        return [self.of(policy) for policy in policies]

    def of(self, policy: Policy) -> Measured:
        assert isinstance(policy, (Dense, Adaptive))
        shares = (policy.page_share, policy.decode_share)
        (loss, work), (own, read) = (world(policy, share, self.gates_lose) for share in shares)
        pages = BITS[policy.page_bits][0] * policy.page_share if policy.page_bits else 0.0
        return measured((loss, work), (own + self.trace * pages, read))

    def search(self, gates: Sequence[Adaptive] = (Adaptive(0.9), Adaptive(0.95))) -> Search:
        return Search(self.measure, self.measure, N_LAYERS, gates, {"window": 512, "sinks": 8}, SOME)

    def cheapest(self, budget: float) -> float:
        """By trying everything."""
        shares = np.geomspace(1e-5, 0.3, 2000)
        costs = []
        for layers in range(2**N_LAYERS):
            on = [bool(layers >> at & 1) for at in range(N_LAYERS)]
            gates = self.gates_lose * GATE_LOSS[on].sum()
            for factor, sketch in BITS.values():
                prefill = shares[factor * shares + gates <= budget]
                left = DECODE_PART * budget - gates - self.trace * factor * prefill
                prefill, decode = prefill[left > 0], left[left > 0] / factor
                cost = sketch + READ * (prefill**-0.4 + decode**-0.4) / 2
                costs.append((1 - GATE_SAVES * np.mean(on)) * cost.min(initial=100.0))
        return float(min(costs))


BUDGET = {"conservative": 0.002, "balanced": 0.005, "aggressive": 0.02}


@pytest.mark.parametrize("gates_lose", [0.1, 1.0, 3.0])
def test_search_finds_what_is_known_to_be_cheapest(gates_lose: float) -> None:
    here = World(gates_lose)
    found = here.search().run(BUDGET)
    assert list(found) == list(BUDGET)
    for name, trial in found.items():
        known = here.of(trial.policy)
        assert known.kl <= BUDGET[name]
        assert known.decode_kl <= DECODE_PART * BUDGET[name]
        assert trial.measured == known
        assert trial.cost <= 1.11 * here.cheapest(BUDGET[name])
        assert (trial.policy.window, trial.policy.sinks) in ((512, 8), (1024, 16))
    assert len(here.asked) == len(set(here.asked)), "nothing is measured twice"
    assert len(here.asked) <= most(2, 3) + N_LAYERS


@pytest.mark.parametrize("trace", [0.02, 0.25])
def test_a_prompt_leaves_another_trace_than_expected(trace: float) -> None:
    here = World(1000.0, trace)
    for name, trial in here.search().run(BUDGET).items():
        assert trial.loss <= BUDGET[name]
        assert trial.cost <= 1.1 * here.cheapest(BUDGET[name])


def test_a_share_that_is_right_stays_while_the_other_moves() -> None:
    here = World(1000.0, trace=0.25)
    here.search(gates=[]).run({"balanced": 0.005})
    refined = [policy for policy in here.asked[6:] if isinstance(policy, Dense)]
    assert len({policy.page_share for policy in refined}) == 1
    assert len({policy.decode_share for policy in refined}) == len(refined) > 1


@given(st.integers(1, 200))
def test_bands_are_all_layers(n_layers: int) -> None:
    found = bands(n_layers)
    assert [layer for band in found for layer in band] == list(range(n_layers))
    assert len(found) == min(n_layers, BANDS)


def test_gates_that_lose_much_are_left_out() -> None:
    """Pages alone, as on real models a gate loses much for the few bytes that it saves."""
    for trial in World(1000.0).search().run(BUDGET).values():
        assert isinstance(trial.policy, Dense)
    assert all(isinstance(t.policy, Dense) for t in World().search(gates=[]).run(BUDGET).values())


def test_gates_stand_where_they_lose_little() -> None:
    policy = World().search().run({"balanced": 0.005})["balanced"].policy
    assert isinstance(policy, Adaptive)
    thresholds = np.asarray(policy.threshold)
    assert (thresholds[[2, 3]] == 0.95).all()
    assert thresholds[0] > 1


class Together(World):
    """Where losses come to three times their sum."""

    def measure(self, policies: Sequence[Policy]) -> list[Measured]:
        found = super().measure(policies)
        gated = [isinstance(p, Adaptive) and p.page_bits != 0 for p in policies]
        return [times(m, 3) if both else m for m, both in zip(found, gated, strict=True)]


def test_losses_that_do_not_add_up() -> None:
    here = Together()
    for name, trial in here.search().run(BUDGET).items():
        assert trial.loss <= BUDGET[name]
        parts = [part * BUDGET[name] for part in (1, OWN)]
        pages = min(np.mean([s + READ * (f / part) ** 0.4 for part in parts]) for f, s in BITS.values())
        assert trial.cost <= 1.1 * pages


def test_a_budget_that_cannot_be_met() -> None:
    class Bad(World):
        def measure(self, policies: Sequence[Policy]) -> list[Measured]:
            return [times(m, 1, 0.001) for m in super().measure(policies)]

    with pytest.raises(
        ArgumentError, match=r"balanced budget of 0\.0005 nats cannot be met: the best is .*0\.00"
    ):
        Bad().search().run({"balanced": 0.0005})
    with pytest.raises(ArgumentError) as error:
        Bad().search().run({"conservative": 0.0005, "balanced": 0.0008, "aggressive": 0.02})
    unmet = (
        r"the conservative budget of 0\.0005 nats and the balanced budget of 0\.0008 nats cannot be met: .*"
    )
    assert re.fullmatch(unmet + r"; \S+ would be aggressive", str(error.value))


def test_trials_that_lose_nothing_have_logarithms() -> None:
    assert min(Trial(Dense(), measured((0.0, 50.0), (0.0, 50.0))).losses) > 0


# ---- the command ----

SIZES = ["--window", "64", "--sinks", "4", "--ctx", "600", "--limit", "600", "--decode", "70"]


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_model, tmp_path / "m.gguf"))


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    words = np.random.default_rng(0).choice(["the", "hand", "and", "inner", "thing", "\n"], 1500)
    path = tmp_path / "prose.txt"
    path.write_text(" ".join(words))
    return path


def test_from_end_to_end(model: Path, prose: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["calibrate", str(model), "--text", str(prose), *SIZES, "--budget-kl", "0.01"]
    assert main(command) == 0
    path = beside([model])
    shown = capsys.readouterr().out
    assert f"{path} written" in shown
    assert [file.suffix for file in sorted(path.parent.iterdir())] == [".gguf", ".profile", ".txt"]
    llm = LLM(model)
    assert llm.profile
    assert llm.attention == llm.profile.presets["balanced"].policy
    assert list(llm.profile.presets) == list(PRESETS)
    for name, preset in llm.profile.presets.items():
        assert f"{name}: {preset.policy}" in shown
        assert preset.budget == pytest.approx(BUDGETS[name] * 0.01)
        assert (preset.policy.window, preset.policy.sinks) == (64, 4)
        tuned = Measured(**llm.profile.made["tuned"][name])
        assert tuned.loss <= preset.budget
        assert preset.measured.decode_tokens == 70
    made = llm.profile.made
    assert made["answers"] == {"gates": {}, "presets": {}}
    assert "no gate was tried: the context is too short" in shown
    assert list(made["texts"]) == ["fit", "tune", "report"]
    digests = [digest for texts in made["texts"].values() for digest in texts.values()]
    assert len(digests) == len(set(digests)) == 3
    assert llm.profile.local_shares.shape == (2, 8)
    # The same command makes the same file, and does not mind a broken one.
    first = path.read_bytes()
    path.write_bytes(b"broken")
    assert main(command) == 0
    assert path.read_bytes() == first


def test_says_which_presets_are_over_their_budget() -> None:
    """What a budget bounds is the end of the interval, of prefill and of decode."""
    within = Measured(900, 0.004, 0.003, 0.01, 97.5, 20.0, 200, 0.002, 0.001, 0.0035, 12.0)
    profile = profile_of("00")  # each with a budget of 0.01
    found = [
        over_budget(replace(profile, presets={"balanced": replace(profile.presets["balanced"], measured=m)}))
        for m in (
            within,
            replace(within, kl_high=0.011),
            replace(within, decode_kl_high=0.0041),
            replace(within, decode_kl=0.0041, decode_kl_high=0.006),
        )
    ]
    assert found[0] == []
    assert found[1] == found[2]
    assert found[1][0].startswith("balanced: the interval ends over its budget of 0.01 nats on this text")
    assert found[3][0].startswith("balanced: even the mean is over its budget of 0.01 nats")


def test_says_what_is_lost_on_answers() -> None:
    """Against the presets' budgets, which are 0.01."""
    lost = {"balanced": 0.00025, "aggressive": 0.02}
    answers = {"gates": {"adaptive:0.95": 0.03, "adaptive:0.99": 0.001}, "presets": lost}
    refused, presets = on_answers(replace(profile_of("00"), made={"answers": answers}))
    assert refused == "not tried as gates, for what they lose on answers: adaptive:0.95 0.03"
    assert presets == "lost on answers, in nats: balanced 0.00025, aggressive 0.02 (over its budget)"
    answers["gates"] = {}
    assert on_answers(replace(profile_of("00"), made={"answers": answers})) == [presets]


def test_reported_is_what_a_session_does(model: Path, prose: Path) -> None:
    """The report's text, read again under a preset, gives the report's figures."""
    assert main(["calibrate", str(model), "--text", str(prose), *SIZES]) == 0
    llm = LLM(model)
    assert llm.profile
    plan = Plan(**llm.profile.made["plan"])
    ids = {name: llm.tokenize(text, parse_special=False) for name, text in texts.files([str(prose)]).items()}
    (text,) = deal(ids, [], 3, n_ctx=plan.n_ctx, limit=plan.limit, least=plan.least)[2]
    assert llm.profile.made["texts"]["report"] == {text.name: text.sha256}
    preset = llm.profile.presets["aggressive"]
    session = llm.session(attention="aggressive")
    session.eval(text.tokens[:-71])
    assert session.stats.bulk_work == pytest.approx(preset.measured.bulk_work)
    before = session.stats
    for token in text.tokens[-71:-1]:
        session.eval([token])
    assert (session.stats - before).bulk_read == pytest.approx(preset.measured.bulk_read)


def test_an_interrupted_calibration_goes_on(model: Path, prose: Path, tmp_path: Path) -> None:
    """Nothing is measured twice, and the profile is that of a calibration without an interruption."""
    llm, documents, kept = LLM(model, attention=Dense()), texts.files([str(prose)]), tmp_path / "trials"
    plan = Plan(budget_kl=0.01, n_ctx=600, limit=600, n_decode=70, window=64, sinks=4)
    done: list[int] = []

    def run(until: float, plan: Plan = plan) -> bytes:
        done.append(0)

        def progress(n: int, _: int) -> None:
            done[-1] = n
            if n > until:
                raise KeyboardInterrupt

        calibrate(llm, documents, plan, progress, kept).save(tmp_path / "p")
        return (tmp_path / "p").read_bytes()

    expected = run(math.inf)
    whole = done[-1]
    kept.unlink()
    with pytest.raises(KeyboardInterrupt):
        run(0.8 * whole)
    known = json.loads(kept.read_text())["trials"]
    assert known
    assert run(math.inf) == expected
    assert done[-1] < whole - 400 * len(known)
    assert json.loads(kept.read_text())["trials"].items() >= known.items()
    # Figures do not depend on the budget, though which are wanted besides the first does; they depend on all
    # else, and what is damaged is replaced.
    run(math.inf, replace(plan, budget_kl=0.011))
    assert done[-1] < whole - 400 * len(PAGE_BITS) * len(PAGE_SHARES)
    for spoil in (lambda: run(math.inf, replace(plan, sinks=5)), lambda: kept.write_bytes(b"[" * 200_000)):
        spoil()
        assert run(math.inf) == expected
        assert done[-1] == whole


WRONG = {
    "budget": (["--budget-kl", "0"], "budget: expected nats above 0"),
    "no number": (["--budget-kl", "nan"], "budget: expected nats above 0"),
    "decode": (["--decode", "3"], "n_decode: expected more than 64"),
    "limit": (["--limit", "0"], "limit: expected at least 1"),
    "window": (["--window", "0"], "window: expected"),
    "short": (["--window", "1024"], "too short: with a window of 1024, each"),
    "context": (["--ctx", "100000"], "trained on at most"),
    "text": (["--text", "nowhere.txt"], "nowhere.txt"),
    "out": (["--out", "nowhere/p"], "nowhere/p: cannot be written"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_refusals_are_one_line(
    wrong: str, model: Path, prose: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = WRONG[wrong]
    assert main(["calibrate", str(model), "--text", str(prose), *SIZES, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not beside([model]).exists()


@pytest.mark.slow
def test_the_default_model(default_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "p"
    sizes = ["--window", "128", "--ctx", "512", "--limit", "512", "--decode", "70"]
    assert main(["calibrate", str(default_model), *sizes, "--budget-kl", "0.05", "--out", str(out)]) == 0
    profile = Profile.load(out, LLM(default_model, attention="dense").fingerprint)
    presets = profile.presets
    for name, preset in presets.items():
        assert Measured(**profile.made["tuned"][name]).loss <= preset.budget
        assert preset.measured.cost < 75
        assert preset.measured.kl < 4 * preset.budget
    costs = [Measured(**profile.made["tuned"][name]).cost for name in PRESETS]
    assert costs == sorted(costs, reverse=True)
    answer = LLM(default_model, attention=f"balanced:{out}").generate("The tide", max_tokens=4)
    assert list(answer["attention"]["evaluated"]) == [str(presets["balanced"].policy)]
