"""`pyllm eval`: its metrics against numpy, its rows, and the command from end to end on a tiny model."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from pyllm import LLM, Adaptive, Calibration, Dense, FormatError, Oracle, Static, Window
from pyllm.attention import REST
from pyllm.bulk import first_with_bulk
from pyllm.cli import main
from pyllm.evaluate import texts, tradeoff
from pyllm.evaluate.candidates import ROWS, Candidate, Choice, Fitted, candidates
from pyllm.evaluate.evaluation import Evaluation, fitting_texts
from pyllm.evaluate.metrics import BLOCK, Reference, Scores, blocks_interval, perplexity, student
from pyllm.evaluate.results import Results
from pyllm.evaluate.static_labels import local_shares
from pyllm.evaluate.texts import Text
from pyllm.local_heads import top_share

WINDOW, SINKS = 64, 4
FIRST = first_with_bulk(WINDOW, SINKS)


def random_text(llm: LLM, n: int, seed: int) -> Text:
    tokens = np.random.default_rng(seed).integers(0, 256, n).astype(np.int32)
    return Text("noise", tokens)


def log_softmax(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    found: np.ndarray = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return found


# ---- metrics ----


@given(st.integers(1, 70), st.integers(2, 90), st.floats(0, 3), st.integers(0, 2**32 - 1))
def test_scores_are_numpys(n: int, n_vocab: int, noise: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dense = rng.normal(0, 4, (n, n_vocab)).astype(np.float32)
    other = (dense + rng.normal(0, noise, dense.shape)).astype(np.float32)
    targets = rng.integers(0, n_vocab, n)
    scores = Reference(dense, targets).compare(other)
    p, q = log_softmax(dense), log_softmax(other)
    # p is a float32's exponential: half an ulp of 16 to 32 in its argument, times differences of up to 12.
    np.testing.assert_allclose(scores.kl, (np.exp(p) * (p - q)).sum(axis=1), rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(scores.agrees, dense.argmax(axis=1) == other.argmax(axis=1))
    np.testing.assert_allclose(scores.nll, -q[np.arange(n), targets], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scores.dense_nll, -p[np.arange(n), targets], rtol=1e-5, atol=1e-5)


def test_known_answers() -> None:
    quarters = np.log(np.array([[0.5, 0.25, 0.25]], np.float32))
    uniform = np.zeros((1, 3), np.float32)
    scores = Reference(quarters, np.array([1])).compare(uniform + 7)
    assert scores.kl[0] == pytest.approx(np.log(3) - 1.5 * np.log(2), abs=1e-6)
    assert perplexity(scores.nll) == pytest.approx(3)
    assert perplexity(scores.dense_nll) == pytest.approx(4)
    assert not Reference(quarters, np.array([1])).compare(np.flip(quarters, 1)).agrees[0]


def test_equal_logits_have_no_divergence_at_all(rng: np.random.Generator) -> None:
    logits = rng.normal(0, 10, (33, 500)).astype(np.float32)
    scores = Reference(logits, np.zeros(33, int)).compare(logits.copy())
    assert not scores.kl.any()
    assert scores.agrees.all()


def test_scores_join(rng: np.random.Generator) -> None:
    logits = rng.normal(0, 1, (9, 5)).astype(np.float32)
    other, targets = logits[::-1].copy(), np.arange(9) % 5
    whole = Reference(logits, targets).compare(other)
    halves = [Reference(logits[s], targets[s]).compare(other[s]) for s in (slice(4), slice(4, 9))]
    np.testing.assert_array_equal(Scores.joined(halves).kl, whole.kl)
    assert len(Scores.joined([])) == 0
    with pytest.raises(ValueError, match="shape"):
        Reference(logits, targets).compare(other[:3])


@pytest.mark.parametrize(("n_blocks", "least"), [(8, 0.86), (40, 0.89)])
def test_interval_covers_the_mean_of_dependent_tokens(n_blocks: int, least: float) -> None:
    """Tokens of a block are the same here, and a few blocks hold most: percentiles of a bootstrap have the
    mean below their upper end in 79 % of the cases with 8 blocks."""
    rng = np.random.default_rng(7)
    covered, below = 0, 0
    for _ in range(2000):
        interval = blocks_interval(np.repeat(rng.lognormal(0, 1, n_blocks), BLOCK))
        assert interval
        covered += interval[0] <= math.exp(0.5) <= interval[1]
        below += math.exp(0.5) <= interval[1]
    assert least * 2000 <= covered <= below <= 0.97 * 2000


def test_interval_of_little(rng: np.random.Generator) -> None:
    assert blocks_interval(np.arange(BLOCK) / 1.0) is None
    assert blocks_interval(np.full(BLOCK + 1, 0.25)) == (0.25, 0.25)
    assert blocks_interval(np.zeros(3 * BLOCK)) == (0, 0)
    values = rng.random(50 * BLOCK)
    interval = blocks_interval(values)
    assert interval
    assert 0 < interval[0] < values.mean() < interval[1]


def test_quantiles_of_students_t() -> None:
    """Abramowitz and Stegun, table 26.10."""
    for n, quantile in (
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (7, 2.365),
        (15, 2.131),
        (30, 2.042),
        (120, 1.980),
    ):
        assert student(n) == pytest.approx(quantile, rel=0.01)


# ---- rows ----


@given(st.integers(1, 5), st.integers(1, 12), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_top_share(n_layers: int, n_heads: int, share: float, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 5, (n_layers, n_heads)) / 5
    labels = top_share(values, share)
    assert labels.sum() == round(share * values.size)
    if labels.any() and not labels.all():
        assert values[labels].min() >= values[~labels].max()


def calibration(rng: np.random.Generator, moments: str) -> Calibration:
    """For the tiny model."""
    covariances = np.broadcast_to(np.eye(32), (2, 2, 32, 32))
    return Calibration(
        rng.normal(size=(2, 8, 3)),
        rng.normal(size=(2, 2, 32)),
        covariances,
        rng.random((2, 2, 32)),
        rng.random((2, 2, 32)),
        rng.normal(size=(2, 2, 32)),
        (4, 300),
        moments,
    )


def test_rows_with_shares_for_decode() -> None:
    choice = Choice(
        policies=["pages"], page_shares=(0.01, 0.02), decode_shares=(0.001, 0.002), page_bits=(3,)
    )
    assert [(row.name, row.policy) for row in candidates(choice)] == [
        (f"pages 3-bit, {d:g} in decode {p:g}", Dense(page_bits=3, page_share=p, decode_share=d))
        for d in (0.001, 0.002)
        for p in (0.01, 0.02)
    ]


def test_rows_of_a_choice(rng: np.random.Generator) -> None:
    local = np.array([[0.9, 0.8, 0.1, 0.7], [0.6, 0.5, 0.4, 0.3]])
    choice = Choice(WINDOW, SINKS, tuple(ROWS), (0.5, 0.9), (0.5,), (0.01,), page_bits=(2, "graded"))
    geometry: dict[str, Any] = {"window": WINDOW, "sinks": SINKS}
    settings = [(granularity, threshold) for granularity in ("head", "group") for threshold in (0.5, 0.9)]
    prompt, other = (calibration(rng, moments) for moments in ("prompt", "calibrated"))
    fitted = Fitted(2, local, {"prompt": prompt, "calibrated": other})
    tiers: dict[str, dict[str, Any]] = {
        "2-bit": {"page_bits": 2, "page_share": 0.01},
        "graded": {"page_bits": "graded", "page_share": 0.01, "calibration": prompt, "page_rest": REST},
    }
    assert candidates(choice, fitted) == [
        Candidate("dense", Dense(**geometry)),
        Candidate("window", Window(**geometry)),
        Candidate("static head", Static([[1, 1, 0, 1], [1, 0, 0, 0]], **geometry), 0.5),
        # The third head of the first layer is hardly ever local, and neither is therefore its group.
        Candidate("static group", Static([[1, 1, 0, 0], [1, 1, 0, 0]], **geometry), 0.5),
        *(Candidate(f"oracle {g}", Oracle(t, g, window=WINDOW, sinks=SINKS), t) for g, t in settings),
        *(
            Candidate(f"{name} {g}", Adaptive(t, g, window=WINDOW, sinks=SINKS, **options), t)
            for name, options in (
                ("adaptive", {}),
                ("frozen", {"gaussian": "frozen"}),
                ("truncated", {"gaussian": "truncated"}),
                ("regression", {"estimate": "regression", "calibration": prompt}),
                ("maximum", {"estimate": "maximum", "calibration": prompt}),
                ("calibrated", {"moments": "calibrated", "calibration": other}),
                (
                    "calibrated-maximum",
                    {"moments": "calibrated", "estimate": "maximum", "calibration": other},
                ),
            )
            for g, t in settings
        ),
        *(Candidate(f"pages {name}", Dense(**geometry, **tier), 0.01) for name, tier in tiers.items()),
        *(
            Candidate(f"adaptive+pages {name}", Adaptive(0.9, "group", **geometry, **tier), 0.01)
            for name, tier in tiers.items()
        ),
    ]


def test_evaluate_is_what_sessions_say(tiny: LLM, rng: np.random.Generator) -> None:
    text = random_text(tiny, 301, seed=int(rng.integers(2**31)))
    policies = {
        "dense": Dense(window=WINDOW, sinks=SINKS),
        "window": Window(window=WINDOW, sinks=SINKS),
        "long": Adaptive(2.0, window=WINDOW, sinks=SINKS),
    }
    rows = tradeoff.evaluate(
        tiny, text, [Candidate(name, policy) for name, policy in policies.items()], n_decode=10
    )
    dense, window, long = rows
    for row in (dense, long):
        assert (row.kl, row.kl_low, row.kl_high, row.decode_kl) == (0.0, 0.0, 0.0, 0.0)
        assert (row.top1, row.heads_local, row.bulk_work, row.bulk_read) == (100.0, 0.0, 100.0, 100.0)
        assert row.perplexity == row.dense_perplexity
    assert (window.heads_local, window.bulk_work, window.bulk_read) == (100.0, 0.0, 0.0)

    inputs = text.tokens[:-1]
    p, q = (log_softmax(tiny.session(attention=policies[name]).eval(inputs, all_logits=True))
            for name in ("dense", "window"))  # fmt: skip
    assert not np.allclose(p[FIRST], q[FIRST], atol=1e-4)
    np.testing.assert_allclose(p[:FIRST], q[:FIRST], atol=1e-6)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    assert window.tokens == 290 - FIRST
    assert window.kl == pytest.approx(kl[FIRST:290].mean(), rel=1e-4)
    assert window.decode_tokens == 10
    assert window.decode_kl == pytest.approx(kl[290:].mean(), rel=1e-4)
    assert window.top1 == pytest.approx(100 * (p.argmax(1) == q.argmax(1))[FIRST:290].mean())
    nll = -q[np.arange(300), text.tokens[1:]]
    assert window.perplexity == pytest.approx(np.exp(nll[FIRST:290].mean()), rel=1e-4)


def test_quality_does_not_depend_on_how_the_text_is_cut(
    tiny: LLM, tiny_model: Path, rng: np.random.Generator
) -> None:
    text = random_text(tiny, 260, seed=int(rng.integers(2**31)))
    row = Candidate("adaptive", Adaptive(0.6, "head", window=WINDOW, sinks=SINKS))
    whole, small = (
        tradeoff.evaluate(LLM(tiny_model, n_batch=n), text, [row], n_decode=0)[0] for n in (512, 37)
    )
    assert (whole.kl, whole.heads_local, whole.tokens) == (small.kl, small.heads_local, small.tokens)
    assert whole.kl > 0
    assert (whole.decode_tokens, whole.decode_kl, whole.decode_ms) == (0, None, None)


def test_local_shares_are_the_oracles(tiny: LLM) -> None:
    """In the first layer, queries and keys do not depend on what other heads read."""
    text = random_text(tiny, 400, seed=0)  # one with heads of both kinds
    shares = local_shares(tiny, [text], WINDOW, SINKS)
    assert shares.shape == (2, 8)
    session = tiny.session(attention=Dense(window=WINDOW, sinks=SINKS))
    session.eval(text.tokens[:-64])
    before = session.stats
    session.attention = Oracle(0.9, "head", window=WINDOW, sinks=SINKS)
    session.eval(text.tokens[-64:])
    first_layer = (session.stats - before).layers[0]
    assert first_layer.heads_local == pytest.approx(100 * shares[0].mean())
    assert 0 < shares[0].mean() < 1


# ---- texts ----


def test_builtin_texts_differ_from_those_for_fitting() -> None:
    evaluated, fitted = texts.builtin(), texts.builtin(fitted=True)
    assert evaluated.keys() == fitted.keys() == {"prose", "code"}
    assert all(len(text) > 100_000 for text in (*evaluated.values(), *fitted.values()))
    lines = [{line for line in text["code"].splitlines() if len(line) > 60} for text in (evaluated, fitted)]
    assert len(lines[0] & lines[1]) < len(lines[0]) / 20


def test_excerpt(tiny: LLM) -> None:
    text = "".join(f"line {i}\n" for i in range(3000))
    found = texts.excerpt(tiny, "lines", text, 100, seed=5)
    assert len(found.tokens) == 100
    shown = tiny.detokenize(found.tokens)
    assert shown in text
    assert shown.startswith("line ")
    np.testing.assert_array_equal(texts.excerpt(tiny, "lines", text, 100, seed=5).tokens, found.tokens)
    assert any(
        not np.array_equal(texts.excerpt(tiny, "lines", text, 100, seed=seed).tokens, found.tokens)
        for seed in range(6, 16)
    )
    assert tiny.detokenize(texts.excerpt(tiny, "short", "a\nb", 100, seed=5).tokens) == "a\nb"


# ---- the command ----


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    words = np.random.default_rng(0).choice(["the", "hand", "and", "inner", "thing", "\n"], 600)
    path = tmp_path / "prose.txt"
    path.write_text(" ".join(words))
    return path


def command(model: Path, prose: Path, *arguments: str | Path) -> list[str]:
    fixed = ("eval", model, "--text", prose, "--ctx", "300", "--window", WINDOW, "--sinks", SINKS)
    return [str(x) for x in (*fixed, "--decode", "4", *arguments)]


def test_from_end_to_end(
    tiny_model: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = [tmp_path / f"out.{kind}" for kind in ("json", "csv", "png")]
    asked = ["--thresholds", "0.6,0.9", "--shares", "0.5"]
    asked += ["--policies", "dense,window,static,oracle,adaptive,pages,adaptive+pages"]
    asked += [str(x) for kind, path in zip(("json", "csv", "plot"), outputs, strict=True)
              for x in (f"--{kind}", path)]  # fmt: skip
    asked += ["--page-shares", "0.01", "--decode", str(BLOCK)]
    assert main(command(tiny_model, prose, *asked)) == 0
    shown = capsys.readouterr()
    lines = ["dense", "window", *(f"static {g} 0.5" for g in ("head", "group"))]
    lines += [
        f"{name} {g} {t}" for name in ("oracle", "adaptive") for g in ("head", "group") for t in (0.6, 0.9)
    ]
    found = [line for line in shown.out.splitlines() if line.startswith(tuple(lines))]
    assert [next(name for name in lines if line.startswith(name)) for line in found] == lines * 2
    assert "in decode" in shown.out
    assert f"prose.txt: {300 - BLOCK - FIRST} tokens with a bulk" in shown.out
    assert "…" not in shown.out

    content = json.loads(outputs[0].read_text())
    assert [len(content["rows"]), np.shape(content["local_shares"])] == [14, (2, 8)]
    assert content["settings"]["window"] == WINDOW
    with outputs[1].open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["line"] for row in table] == [row["line"] for row in content["rows"]]
    assert [float(row["kl"]) for row in table] == [row["kl"] for row in content["rows"]]
    image = imread(outputs[2])[..., :3]
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10


def test_finished_rows_are_not_evaluated_again(
    tiny_model: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    arguments = command(tiny_model, prose, "--policies", "dense,window,adaptive", "--json", path)

    def rows() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
        return found

    assert main([*arguments, "--thresholds", "0.9", "--limit", "3"]) == 0
    assert "1 rows are left" in capsys.readouterr().err
    first = rows()
    assert [row["line"] for row in first] == ["dense", "window", "adaptive head"]
    assert main([*arguments, "--thresholds", "0.9"]) == 0
    assert len(rows()) == 4
    # Measured times would differ if a row were evaluated again.
    assert rows()[:3] == first
    finished = path.read_bytes()
    assert main([*arguments, "--thresholds", "0.9"]) == 0
    assert path.read_bytes() == finished
    # One more threshold is two more rows.
    assert main([*arguments, "--thresholds", "0.5,0.9"]) == 0
    assert len(rows()) == 6
    assert rows()[:3] == first
    assert capsys.readouterr().out.count("adaptive head 0.5") == 1


def test_what_is_finished_is_not_fitted_again(
    tiny_model: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fit reads the fitted texts, which here are gone from the second run."""
    llm, path = LLM(tiny_model, n_ctx=300), tmp_path / "rows.json"
    rows = ("window", "static", "maximum")
    choice = Choice(WINDOW, SINKS, rows, thresholds=(0.9,), shares=(0.5,), page_bits=(3,))
    text = texts.excerpt(llm, "prose", prose.read_text(), 301, 0)

    def evaluation(choice: Choice, other: Sequence[Text]) -> Evaluation:
        results = Results.open(path, {})
        return Evaluation(llm, choice, [text], other, results, path, n_decode=4, seed=0, n_ctx=300)

    first = evaluation(choice, fitting_texts(llm, choice, 300, 0))
    assert first.run(None, lambda *_: None) == 0
    finished = path.read_bytes()
    again = evaluation(replace(choice, policies=("maximum", "static", "pages"), page_shares=(0.01,)), ())
    assert again.run(None, lambda *_: None) == 0
    names = [f"{name} {g}" for name in ("maximum", "static") for g in ("head", "group")]
    assert sorted(row.line for row in again.finished()) == sorted([*names, "pages 3-bit"])
    assert [record.line for record in again.classifiers()] == ["maximum"]
    assert finished != path.read_bytes()
    assert evaluation(choice, ()).run(None, lambda *_: None) == 0


def test_rows_that_are_asked_for_twice(
    tiny_model: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    named = ["--attention", f"dense,window={WINDOW},sinks={SINKS}", f"window:{WINDOW},sinks={SINKS}"]
    assert main(command(tiny_model, prose, "--policies", "window,window", "--json", path, *named)) == 0
    assert [row["line"] for row in json.loads(path.read_text())["rows"]] == [
        "window",
        "dense,window=64,sinks=4",
        "window:64,sinks=4",
    ]
    one = ["eval", tiny_model, "--text", prose, "--ctx", 1150, "--decode", 0, "--attention", "dense", "dense"]
    assert main([str(x) for x in (*one, "--json", tmp_path / "one")]) == 0
    assert len(json.loads((tmp_path / "one").read_text())["rows"]) == 1


def test_settings_say_what_was_fitted_on(
    tiny_model: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    arguments = ["--shares", "0.5", "--json", str(path), "--policies"]

    def run(policies: str) -> dict[str, Any]:
        assert main(command(tiny_model, prose, *arguments, policies)) == 0
        settings: dict[str, Any] = json.loads(path.read_text())["settings"]
        return settings

    assert "fitted texts" not in run("window")
    settings = run("window,static")
    llm = LLM(tiny_model, n_ctx=300)
    texts = fitting_texts(llm, Choice(policies=("static",)), 300, 0)
    assert settings["fitted texts"] == {text.name: text.sha256 for text in texts}
    assert settings["device"] == "cpu"
    assert run("dense") == settings
    content = json.loads(path.read_text())
    content["settings"]["fitted texts"] = {"prose": "of another Python"}
    path.write_text(json.dumps(content))
    assert main(command(tiny_model, prose, *arguments, "window,static")) == 1
    assert "made with fitted texts {'prose': 'of another Python'}" in capsys.readouterr().err


def test_results_of_other_settings_are_not_mixed(
    tiny_model: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    assert main(command(tiny_model, prose, "--policies", "window", "--json", path)) == 0
    kept = path.read_bytes()
    assert main(command(tiny_model, prose, "--policies", "window", "--json", path, "--seed", "1")) == 1
    assert f"{path}: these results were made with seed 0, now it is 1" in capsys.readouterr().err
    assert path.read_bytes() == kept
    for broken in (b"", b"[]", b'{"format": "x"}', kept[:-30], kept.replace(b'"kl":', b'"lk":'), b"\xff"):
        path.write_bytes(broken)
        assert main(command(tiny_model, prose, "--policies", "window", "--json", path)) == 1
        assert str(path) in capsys.readouterr().err
        assert path.read_bytes() == broken
    path.write_bytes(kept)
    with pytest.raises(FormatError, match="batch 512, now it is None"):
        Results.open(path, {})


WRONG_FIELDS: list[tuple[str, Any, str]] = [
    ("rows/1/kl", None, "row 2: kl: expected float, got None"),
    ("rows/0/bulk_work", "x", "row 1: bulk_work: expected float | None, got 'x'"),
    ("rows/0/tokens", 1.5, "row 1: tokens: expected int, got 1.5"),
    ("rows/0/tokens", True, "row 1: tokens: expected int, got True"),
    ("rows/0/top1", math.nan, "row 1: top1: expected float, got nan"),
    ("rows/0/top1", 10**400, "row 1: top1: expected float, got 1000"),
    ("rows/0/windw", 3, "row 1: there is no 'windw'"),
    ("rows/0", [3], "row 1: expected an object, got [3]"),
    ("rows", 3, "TypeError"),
    ("settings", [], "settings: expected an object"),
    ("settings/rope base", "x", "settings: expected an object whose rope base"),
    ("local_shares", [1, 2], "local_shares"),
    ("classifiers/0/total/error", "x", "classifier 1: error: expected float, got 'x'"),
    ("classifiers/0/layers/1/recall", "x", "classifier 1: layer 2: recall: expected float | None, got 'x'"),
    ("classifiers/0/threshold", None, "classifier 1: threshold: expected float, got None"),
]


def test_fields_of_another_type(
    tiny_model: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One error that names file, row and field, whoever reads the file."""
    path, broken = tmp_path / "rows.json", tmp_path / "broken.json"
    asked = ["--policies", "adaptive", "--thresholds", "0.9", "--json", str(path)]
    assert main(command(tiny_model, prose, *asked)) == 0
    for place, value, cause in WRONG_FIELDS:
        content = json.loads(path.read_text())
        *folders, last = (int(key) if key.isdigit() else key for key in place.split("/"))
        found = content
        for folder in folders:
            found = found[folder]
        found[last] = value
        broken.write_text(json.dumps(content))
        with pytest.raises(FormatError) as error:
            Results.read(broken)
        assert str(error.value).startswith(f"{broken}: not the results of an evaluation (")
        assert cause in str(error.value)
    del content["rows"][0]["kl"]
    broken.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"row 1: .*'kl'"):
        Results.read(broken)
    broken.write_text("[" * 200_000)
    capsys.readouterr()
    assert main(["eval", "--compare", str(path), str(broken)]) == 1
    assert f"{broken}: not the results of an evaluation (RecursionError" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["eval-smollm2-4k-w256", "eval-smollm2-4k-w256-maximum"])
def test_results_that_are_kept_can_still_be_read(name: str) -> None:
    path = Path(__file__).parents[1] / "docs" / "data" / f"{name}.json"
    assert len(Results.read(path).rows) > 10


BAD = [
    (["--policies", "dense,sideways"], "'sideways' is unknown; there are dense, window, static"),
    (["--policies", ""], "nothing to evaluate"),
    (["--policies", "adaptive", "--thresholds", ""], "nothing to evaluate"),
    (["--policies", "oracle", "--thresholds", "-1"], "threshold"),
    (["--page-bits", "5"], "page_bits"),
    (["--page-shares", "1.5"], "page_share"),
    (["--decode-shares", "1.5"], "decode_share"),
    (["--shares", "1.5"], "share of local heads"),
    (["--ctx", "99999"], "4096"),
    (["--ctx", "0"], "--ctx"),
    (["--ctx", "100"], "from 137 tokens on"),
    (["--window", "0"], "window"),
    (["--window", "4000"], "'prose.txt'"),
    (["--sinks", "65"], "sinks"),
    (["--decode", "-1"], "--decode"),
    (["--decode", "280"], "'prose.txt'"),
    (["--limit", "0"], "--limit"),
    (["--seed", "-1"], "--seed: expected at least 0, got -1"),
    (["--json", "/nosuch/rows.json"], "/nosuch/rows.json: cannot be written"),
    (["--csv", "/"], "/: cannot be written"),
    (["--plot", "/nosuch/plot.png"], "/nosuch/plot.png: cannot be written"),
    (["--plot", "plot.gif"], ".png, .svg, .pdf"),
    (["--text", "nosuch.txt"], "nosuch.txt"),
]


def test_outputs_that_cannot_be_written(
    tiny_model: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the work: one would be lost to another, and a pipe would wait for a reader for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "rows")
    (tmp_path / "leads to a pipe").symlink_to("pipe")
    for arguments, cause in (
        (["--json", "rows", "--csv", "rows"], "--json and --csv are the same file"),
        (["--json", "rows", "--csv", "link"], "--json and --csv are the same file"),
        (["--csv", "p.png", "--plot", "./p.png"], "--csv and --plot are the same file"),
        (["--json", "pipe"], "it is a pipe or a device"),
        (["--csv", "leads to a pipe"], "it is a pipe or a device"),
    ):
        placed = [x if x.startswith("--") else f"{tmp_path}/{x}" for x in arguments]
        assert main(command(tiny_model, prose, *placed)) == 1
        shown = capsys.readouterr()
        assert (shown.out, shown.err.count("\n")) == ("", 1)
        assert cause in shown.err
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize(("arguments", "text"), BAD)
def test_bad_input_is_one_line(
    tiny_model: Path, prose: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert main(command(tiny_model, prose, *arguments)) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("pyllm: error: ")
    assert shown.err.count("\n") == 1
    assert text in shown.err


def test_texts_that_cannot_be_evaluated(
    tiny_model: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("the hand")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "prose.txt").write_text("the hand")
    for files, text in (
        (["empty.txt"], "empty"),
        (["prose.txt", "short.txt"], "'short.txt'"),
        (["prose.txt", "other/prose.txt"], "same name"),
    ):
        paths = [str(tmp_path / file) for file in files]
        assert main(["eval", str(tiny_model), "--window", str(WINDOW), "--text", *paths]) == 1
        assert text in capsys.readouterr().err


def test_numbers_that_are_none(tiny_model: Path, prose: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(command(tiny_model, prose, "--thresholds", "0.9,x"))
    assert exit_.value.code == 2
    assert "'0.9,x'" in capsys.readouterr().err
