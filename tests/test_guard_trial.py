"""The trial of the controller: what it evaluates, and what its command shows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pyllm import LLM, Adaptive, Guard
from pyllm.cli import main
from pyllm.guard import trial


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
    course = trial.run(tiny, tokens, Adaptive(0.0, window=64), guard, 700, seen.append)
    assert sum(seen) == 1400
    assert course.start == 0
    assert [piece.prefill_tokens for piece in course.pieces] == [512, 188, 512, 188]
    early, late = course.half(False), course.half(True)
    assert early.audits > 0
    # Random attention has misses in the first document only: the second begins where that one ended.
    assert (early.miss_rate or 0) > (late.miss_rate or 0)
    assert (course.thresholds > 0).all()


def test_the_command(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: np.random.Generator
) -> None:
    (tmp_path / "a.txt").write_bytes(rng.integers(32, 127, 3000, dtype=np.uint8).tobytes())
    size = ["--tokens", "1500", "--document", "800", "--attention", "adaptive,window=64"]
    command = ["guard", "-m", str(tiny_model), "--text", str(tmp_path / "a.txt"), *size]
    assert main([*command, "--starts", "0,2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [course["start"] for course in found["courses"]] == [0, 2]
    assert found["tokens"] == 1500
    for course in found["courses"]:
        assert course["audits"] > 10
        low, high = course["interval"]
        assert low <= course["miss_rate_second_half"] <= high
    assert main(command) == 0
    assert "of target" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--document", "100"], "--document: expected 768 tokens"),
        (["--tokens", "0"], "--tokens: expected at least 1024"),
        (["--attention", "window"], "--attention: the controller moves adaptive"),
        (["--miss-target", "2"], "miss_target"),
    ],
)
def test_the_command_refuses(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], message: str
) -> None:
    assert main(["guard", "-m", str(tiny_model), *wrong]) == 1
    assert message in capsys.readouterr().err
