"""The adaptive rule's record as a classifier: known answers, and what a session itself decides."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllm import LLM, Adaptive, Oracle
from pyllm.cli import main
from pyllm.evaluate.classifier import Classifier, Quality, classify, is_long
from pyllm.evaluate.fit import fit
from pyllm.evaluate.report import classifier_tables
from pyllm.evaluate.texts import Text
from tiny_models import write_tiny

WINDOW, SINKS = 64, 4
FIRST = WINDOW + SINKS + 63


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("classifier") / "tiny.gguf", tokenizer=True, sharp=4.0)


def text(rng: np.random.Generator, n: int = 300) -> Text:
    """n queries, and what follows the last of them."""
    return Text("noise", rng.integers(0, 300, n + 1).astype(np.int32))


def test_known_answers() -> None:
    called = np.array([True, True, True, False, False])
    truth = np.array([True, True, False, True, False])
    error = np.array([-1, 0, 1, 2, 3], np.float32)
    found = Quality.of(called, truth, error)
    assert found.recall == pytest.approx(200 / 3)
    assert found.precision == pytest.approx(200 / 3)
    assert (found.error, found.error_low, found.error_high) == pytest.approx((1, -0.8, 2.8))
    nothing = np.zeros(5, bool)
    assert Quality.of(nothing, truth, error).precision is None
    assert Quality.of(nothing, truth, error).recall == 0
    assert Quality.of(called, nothing, error).recall is None
    # sigmoid(0 − ln 3) is a quarter, sigmoid(0 + ln 3) three quarters.
    masses = np.array([np.log(3), -np.log(3), np.nan], np.float32)
    assert is_long(np.zeros(3, np.float32), masses, 0.5).tolist() == [True, False, True]
    assert is_long(np.zeros(3, np.float32), masses, 0.0).tolist() == [False, False, True]


@pytest.mark.parametrize("options", [{}, {"gaussian": "truncated"}, {"estimate": "maximum"}], ids=str)
def test_decisions_of_the_first_layer_are_a_sessions(
    path: Path, options: dict[str, Any], rng: np.random.Generator
) -> None:
    """There queries and keys do not depend on what other heads read."""
    llm, sample = LLM(path), text(rng)
    if "estimate" in options:
        options = {**options, "calibration": fit(llm, [text(rng).tokens], window=WINDOW, sinks=SINKS)}
    policy = Adaptive(granularity="head", window=WINDOW, sinks=SINKS, **options)
    thresholds = (0.3, 0.9)
    found = classify(llm, sample, "name", policy, thresholds)
    assert [record.key for record in found] == [("noise", "name", t) for t in thresholds]
    for threshold, record in zip(thresholds, found, strict=True):
        decided = []
        for decides in (
            dataclasses.replace(policy, threshold=threshold),
            Oracle(threshold, "head", window=WINDOW, sinks=SINKS),
        ):
            session = llm.session(attention=decides)
            made = session.new_record(300, audit=True)
            session.eval(sample.tokens[:-1], record=made)
            decided.append((made.is_long[0, FIRST:], made.estimate[0, FIRST:]))
        (called, estimate), (truth, mass) = decided
        assert record.layers[0] == Quality.of(called, truth, estimate - mass)
        assert len(record.layers) == 2


def test_a_text_that_fills_the_context(tmp_path: Path, rng: np.random.Generator) -> None:
    llm = LLM(write_tiny(tmp_path / "short.gguf", tokenizer=True, n_ctx_train=300))
    (record,) = classify(llm, text(rng), "adaptive", Adaptive(window=WINDOW, sinks=SINKS), [0.9])
    assert record.total.error is not None


def test_all_layers_together(path: Path, rng: np.random.Generator) -> None:
    policy = Adaptive(window=WINDOW, sinks=SINKS)
    (record,) = classify(LLM(path), text(rng), "adaptive", policy, [0.9])
    errors = [layer.error for layer in record.layers]
    assert record.total.error == pytest.approx(np.mean(errors), abs=1e-4)
    assert record.total.error_low <= record.total.error_high


def test_reads_back(path: Path, rng: np.random.Generator) -> None:
    (record,) = classify(LLM(path), text(rng), "adaptive", Adaptive(window=WINDOW, sinks=SINKS), [0.9])
    kept = json.loads(json.dumps(dataclasses.asdict(record)))
    assert Classifier.read(kept) == record
    for broken in ({**kept, "more": 1}, {**kept, "layers": [{}]}, {"line": "adaptive"}):
        with pytest.raises((ValueError, KeyError)):
            Classifier.read(broken)


def test_tables_fit_and_name_everything() -> None:
    quality = Quality(100.0, None, -12.345, -100.0, 100.0)
    lines = [f"calibrated-maximum{i}" for i in range(6)]
    records = [Classifier("t", line, tau, quality, (quality,) * 3) for line in lines for tau in (0.5, 0.85)]
    ((headline, tables),) = classifier_tables(records)
    assert "t:" in headline
    assert [table.row_count for table in tables] == [12, 3, 3]
    assert tables[1].columns[0].header == "layer, at 0.85"


def test_the_command_keeps_and_prints_them(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prose, kept = tmp_path / "prose.txt", tmp_path / "rows.json"
    words = np.random.default_rng(0).choice(["the", "hand", "and", "inner", "thing", "\n"], 600)
    prose.write_text(" ".join(words))
    command = ["eval", path, "--text", prose, "--ctx", 300, "--window", WINDOW, "--sinks", SINKS]
    command += ["--decode", 0, "--json", kept, "--policies", "frozen,maximum,calibrated-maximum"]
    arguments = [str(part) for part in command]
    assert main([*arguments, "--thresholds", "0.9", "--limit", "1"]) == 0
    assert "long heads found" not in capsys.readouterr().out
    assert main([*arguments, "--thresholds", "0.9"]) == 0
    shown = capsys.readouterr().out
    assert "prose.txt: long heads found" in shown
    assert "layer, at 0.9" in shown
    assert "…" not in shown
    records = json.loads(kept.read_text())["classifiers"]
    assert [record["line"] for record in records] == ["frozen", "maximum", "calibrated-maximum"]
    assert all(len(record["layers"]) == 2 for record in records)
    finished = kept.read_bytes()
    assert main([*arguments, "--thresholds", "0.9"]) == 0
    assert kept.read_bytes() == finished
    # Another threshold adds its own.
    assert main([*arguments, "--thresholds", "0.5,0.9"]) == 0
    assert [r["threshold"] for r in json.loads(kept.read_text())["classifiers"]] == [0.9] * 3 + [0.5] * 3
