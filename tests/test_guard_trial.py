"""The trial of the controller: what it evaluates, and what its command shows."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from pyllm import LLM, Adaptive, Dense, Guard, Window
from pyllm.cli import main
from pyllm.guard import trial
from pyllm.profile import beside
from test_profile import CALIBRATION, profile_of


def test_texts_take_turns() -> None:
    texts = [np.full(4000, 1, np.int32), np.full(2000, 2, np.int32)]
    tokens = trial.mixed(texts, 5000)
    assert len(tokens) == 5000
    turns = [(1500, 1), (1500, 2), (1500, 1), (500, 2)]
    np.testing.assert_array_equal(tokens, np.repeat([t for _, t in turns], [n for n, _ in turns]))
    assert len(trial.mixed(texts, 9000)) == 6000


def test_control_is_handed_on_from_document_to_document(tiny: LLM) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, 1400).astype(np.int32)
    guard = Guard(audit_rate=1 / 8, control_period=64, repair=False)
    seen: list[int] = []
    course = trial.run(tiny, tokens, Adaptive(window=64), 0.0, guard, 700, seen.append)
    assert sum(seen) == 1400
    assert course.start == 0
    assert [piece.prefill_tokens for piece in course.pieces] == [512, 188, 512, 188]
    early, late = course.half(False), course.half(True)
    assert early.audits > 0
    # Random attention has misses in the first document only: the second begins where that one ended.
    assert (early.miss_rate or 0) > (late.miss_rate or 0)
    assert course.thresholds is not None
    assert (course.thresholds > 0).all()


def test_pages_only_get_stricter(tiny: LLM) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, 1400).astype(np.int32)
    guard = Guard(audit_rate=1 / 8, control_period=64, repair=False)
    policy = Dense(window=64, page_bits=3)
    loose, strict = (
        trial.run(tiny, tokens, policy, start, guard, 700, lambda _: None) for start in (0.5, 1e-5)
    )
    assert loose.thresholds is None
    assert loose.page_share is not None
    assert loose.page_share < 0.5
    early, late = (loose.miss_rate(loose.half(second)) for second in (False, True))
    assert (early or 0) > (late or 0)
    # Nothing is missed, and no share is looser for it.
    assert strict.miss_rate(strict.half(False)) == 0
    assert strict.page_share == pytest.approx(1e-5)


def test_starts_leave_what_never_is_local() -> None:
    preset = Adaptive([0.95, 2.0], page_bits=3)
    for start, expected in ((0.0, (0.0, 2.0)), (0.9, (0.9, 2.0)), (2.0, (1.0, 2.0))):
        assert trial.starting(preset, start) == Adaptive(expected, page_bits=3)
    assert trial.starting(Adaptive([0.5, 0.9]), 2.0) == Adaptive(2.0)


def pieces_of(missed: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """missed (n, audits): the share of all heads that did, in every audit of every piece."""
    return [(np.full((4, 8), int(piece.sum())), missed.shape[1]) for piece in missed]


def test_the_interval_holds_where_heads_err_together() -> None:
    """All heads of a token at once, and the tokens of some pieces far more often than those of others."""
    rng = np.random.default_rng(0)
    spread = 0.7
    held = 0
    for _ in range(300):
        rates = 0.05 * np.exp(spread * rng.normal(size=(20, 1)) - spread**2 / 2)
        low, high = trial.rate_interval(pieces_of(rng.random((20, 8)) < rates)) or (math.nan, math.nan)
        held += low <= 0.05 <= high
    assert held / 300 > 0.9


def test_the_interval_of_few_and_of_none() -> None:
    assert trial.rate_interval(pieces_of(np.ones((1, 8)))) is None
    low, high = trial.rate_interval(pieces_of(np.zeros((10, 8)))) or (math.nan, math.nan)
    assert low == 0
    assert 0.04 < high < 0.05  # of 80 draws
    assert trial.rate_interval(pieces_of(np.ones((10, 8)))) == (1, 1)


@pytest.fixture
def text(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "a.txt"
    path.write_bytes(rng.integers(32, 127, 3000, dtype=np.uint8).tobytes())
    return path


def test_the_command(tiny_model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--tokens", "1500", "--document", "800", "--attention", "adaptive,window=64"]
    command = ["guard", "-m", str(tiny_model), "--text", str(text), *size]
    assert main([*command, "--starts", "0,2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [course["start"] for course in found["courses"]] == [0, 2]
    assert (found["tokens"], found["document"], found["policy"]) == (1500, 800, "adaptive:0.9,window=64")
    assert (found["miss_target"], found["audit_rate"], found["seed"]) == (0.02, 1 / 64, 0)
    for course in found["courses"]:
        assert course["audits"] > 10
        low, high = course["interval"]
        assert low <= course["miss_rate_second_half"] <= high
    assert main(command) == 0
    assert "of target" in capsys.readouterr().out


def test_a_short_text_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("and the hand " * 20)
    size = ["--tokens", "1200", "--document", "600", "--attention", "adaptive:0.9,window=64"]
    assert main(["guard", "-m", str(tiny_model), *size, "--text", str(short)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(
        f"pyllm: error: --text: {short}: expected at least 1024 tokens, for two halves, got "
    )
    assert err.count("\n") == 1


def test_nothing_audited_is_null(tiny_model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--tokens", "1024", "--document", "600", "--attention", "adaptive,window=64", "--text", str(text)]
    command = ["guard", "-m", str(tiny_model), *size, "--starts", "0.9", "--audit-rate", "1e-6"]
    assert main([*command, "--json"]) == 0
    (course,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["courses"]
    assert course["audits"] == 0
    for name in ("miss_rate_first_half", "miss_rate_second_half", "interval", "of_target", "layers"):
        assert course[name] is None
    assert main(command) == 0


def test_presets_and_fitted_estimates(
    tiny_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copy(tiny_model, tmp_path / "m.gguf"))
    fitted = Adaptive([0.9, 2.0], window=64, page_bits=3, estimate="maximum", calibration=CALIBRATION)
    presets = {"conservative": Dense(window=64, page_bits=4), "balanced": fitted, "aggressive": Window()}
    profile_of(LLM(model).fingerprint, presets).save(beside([model]))
    size = ["--tokens", "1024", "--document", "600", "--text", str(text), "--json"]
    command = ["guard", "-m", str(model), *size, "--starts", "0,2", "--attention"]
    assert main([*command, "balanced"]) == 0
    for course in json.loads(capsys.readouterr().out)["courses"]:
        assert course["thresholds"][0] < 2
        assert course["thresholds"][1] == 2
    assert main([*command, "adaptive:0.9,window=64,estimate=maximum"]) == 0
    capsys.readouterr()
    assert main([*command, "aggressive"]) == 1
    assert "the shares of pages, and window" in capsys.readouterr().err
    assert main([*command[:-3], "--attention", "conservative"]) == 0
    courses = json.loads(capsys.readouterr().out)["courses"]
    assert [course["start"] for course in courses] == [0.1, 0.01, 0.001]
    assert all(course["thresholds"] is None and course["page_share"] <= course["start"] for course in courses)
    assert main([*command[:-3], "--starts", "2", "--attention", "conservative"]) == 1
    assert "page_share: expected a number from 0 to 1, got 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--document", "100"], "--document: expected 768 tokens"),
        (["--tokens", "0"], "--tokens: expected at least 1024 tokens, for two halves, got 0"),
        (["--attention", "window"], "--attention: the controller moves adaptive"),
        (["--miss-target", "2"], "miss_target"),
        (["--starts", "0.9,nan"], "threshold: expected numbers >= 0"),
    ],
)
def test_the_command_refuses(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], message: str
) -> None:
    assert main(["guard", "-m", str(tiny_model), *wrong]) == 1
    assert message in capsys.readouterr().err
