"""`pyllm survey`: lengths against another count, projections against sessions, folders as they are."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from folders import prose, write_documents, write_unreadable
from pyllm import LLM, ArgumentError, Dense, DocumentError, FileError, FormatError, documents
from pyllm.attention import PRESETS
from pyllm.cli import main
from pyllm.documents import LARGEST
from pyllm.profile import beside
from pyllm.reference.attention import bulk_end
from pyllm.survey import folder
from pyllm.survey.model_file import ModelFile
from pyllm.survey.projection import bulk_pairs, bulk_tokens, project
from pyllm.survey.shares import BOUNDS, Share, assumed, combined, measured, presets
from pyllm.survey.speed import Speed, measure_speed
from test_profile import POLICIES, profile_of
from tiny_models import write_tiny

WINDOW, SINKS = 64, 4


def command(model: Path, root: Path, *arguments: str | Path) -> list[str]:
    fixed = ("survey", root, "--model", model, "--window", WINDOW, "--sinks", SINKS)
    return [str(x) for x in (*fixed, *arguments)]


# ---- formulas ----


@given(st.integers(1, 900), st.integers(1, 300), st.integers(0, 64))
def test_bulk_counts_are_the_references(n: int, window: int, sinks: int) -> None:
    per_query = [bulk_end(t, sinks, window) - sinks for t in range(n)]
    assert bulk_tokens(np.array([n]), window, sinks)[0] == per_query[-1]
    assert bulk_pairs(np.array([n]), window, sinks)[0] == sum(per_query)


def test_dense_projection_is_what_a_session_counts(tiny: LLM, tiny_model: Path) -> None:
    model, n = ModelFile.open(tiny_model), 401
    session = tiny.session(attention=Dense(window=WINDOW, sinks=SINKS))
    session.eval(np.full(n - 1, 7))
    before = session.stats
    session.eval([7])
    after = session.stats
    one, lengths = (after - before).layer_counts.sum(axis=0), np.array([n])
    assert one[4] == model.kv_bytes * bulk_tokens(lengths, WINDOW, SINKS)[0] > 0
    pairs = tiny.info.n_layers * tiny.info.n_heads * bulk_pairs(lengths, WINDOW, SINKS)[0]
    assert after.layer_counts[:, 2].sum() == pairs * 2 * tiny.info.head_dim  # a score and a value


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=8),
    st.floats(0, 1.2),
    st.floats(0, 1),
    st.integers(300, 6000),
)
def test_projections_are_sums_over_queries(
    tiny_model: Path, lengths: list[int], read: float, work: float, n_ctx: int
) -> None:
    model = ModelFile.open(tiny_model)
    share, speed = Share("some", read, work, ""), Speed(1e-3, 1e-6, 2e-3, 1e-9)
    found = project(model, np.array(lengths), [share], window=256, sinks=16, n_ctx=n_ctx, speed=speed)[0]
    n_bytes, computed, dense = [], 0.0, 0
    for n in (min(n, n_ctx) for n in lengths):
        bulks = np.array([bulk_end(t, 16, 256) - 16 for t in range(n)])
        keys = np.arange(1, n + 1)
        n_bytes.append(model.kv_bytes * (keys - bulks + read * bulks)[-1])
        computed += (keys - bulks + work * bulks).sum()
        dense += keys.sum()
    dense_bytes = model.kv_bytes * np.mean([min(n, n_ctx) for n in lengths])
    assert found.kv_bytes == pytest.approx(np.mean(n_bytes))
    assert found.kv_percent == pytest.approx(100 * np.mean(n_bytes) / dense_bytes)
    weights = model.weight_bytes
    assert found.decode_percent == pytest.approx(100 * (np.mean(n_bytes) + weights) / (dense_bytes + weights))
    assert found.work_percent == pytest.approx(100 * computed / dense)
    n_tokens = sum(min(n, n_ctx) for n in lengths)
    assert found.prefill_seconds == pytest.approx(1e-3 * n_tokens + 1e-6 * computed)
    assert found.decode_ms == pytest.approx(1000 * np.mean([2e-3 + 1e-9 * b for b in n_bytes]))


def test_model_file_says_what_the_opened_model_says(tiny_model: Path, default_model: Path) -> None:
    for path in (tiny_model, default_model):
        model, llm = ModelFile.open(path), LLM(path)
        for name in ("n_layers", "n_kv_heads", "head_dim"):
            assert getattr(model, name) == getattr(llm.info, name)
        assert model.n_ctx == llm.info.n_ctx_train
        assert model.weight_bytes == llm.info.weight_bytes
        small, large = (llm.session_memory(n) for n in (1024, 2048))
        # A session also keeps moments and scratch.
        assert 1024 * model.kv_bytes <= large - small


def test_speed_of_this_machine(tiny_model: Path) -> None:
    """Times are not asserted, but what they are made of."""
    ticks: list[tuple[str, int, int]] = []
    model = ModelFile.open(tiny_model)
    speed = measure_speed(model, 300, 1, lambda *tick: ticks.append(tick))
    assert min(speed.token, speed.pair, speed.step, speed.byte) >= 0
    assert speed.token + speed.pair > 0
    assert speed.step + speed.byte > 0
    assert [total for _, _, total in ticks] == [12] * 12
    with pytest.raises(ArgumentError, match="too short"):
        measure_speed(model, 19)


# ---- folders ----


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    root = tmp_path / "documents"
    write_documents(root)
    return root


def test_every_kind_is_counted(mixed: Path, tiny: LLM, tiny_model: Path) -> None:
    ticks: list[tuple[int, int]] = []
    found = folder.survey(mixed, ModelFile.open(tiny_model).count, lambda *tick: ticks.append(tick))
    paths = [document.path.as_posix() for document in found.documents]
    assert sorted(paths) == ["a.txt", "b/c/page.html", "b/notes.md", "letter.docx", "paper.pdf"]
    for document in found.documents:
        path = mixed / document.path
        assert document.size == os.path.getsize(path)
        text = documents.read(path)
        ids = tiny.tokenize(text, parse_special=False)
        assert document.tokens == len(ids)
        assert tiny.detokenize(ids) == text
    assert ticks == [(i + 1, 5) for i in range(5)]
    assert found.unreadable == []


def test_a_count_by_hand(tmp_path: Path, tiny_model: Path) -> None:
    """The tiny model has no merges with x: every byte is a token. A special token spelled out is text."""
    (tmp_path / "x.txt").write_text("x" * 50)
    (tmp_path / "y.txt").write_text("<|im_end|>")
    found = folder.survey(tmp_path, ModelFile.open(tiny_model).count)
    assert [document.tokens for document in found.documents] == [51, 11]


def test_unreadable_files_are_listed_with_their_cause(
    mixed: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    causes = write_unreadable(mixed)
    path = tmp_path / "all.csv"
    assert main(command(tiny_model, mixed, "--csv", path)) == 0
    shown = capsys.readouterr().out
    assert "5 documents" in shown
    assert f"{len(causes)} could not be read" in shown
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["cause"]]
    assert [row["path"] for row in rows] == list(causes)
    for row in rows:
        assert causes[row["path"]] in row["cause"]
        assert str(mixed) not in row["cause"]
        assert row["path"] in shown
        assert row["tokens"] == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(mixed: Path, tiny_model: Path) -> None:
    (mixed / "secret.txt").write_text("x")
    (mixed / "secret.txt").chmod(0)
    (mixed / "b").chmod(0)
    try:
        found = folder.survey(mixed, ModelFile.open(tiny_model).count)
    finally:
        (mixed / "b").chmod(0o755)
    assert [(one.path.as_posix(), one.cause) for one in found.unreadable] == [
        ("b", "cannot be read: Permission denied"),
        ("secret.txt", "cannot be read: Permission denied"),
    ]


def test_a_file_too_large_is_not_loaded(mixed: Path, tiny_model: Path) -> None:
    with (mixed / "film.txt").open("wb") as file:
        file.truncate(LARGEST + 1)  # a hole, no blocks
    found = folder.survey(mixed, ModelFile.open(tiny_model).count)
    assert [(one.path.name, one.cause) for one in found.unreadable] == [
        ("film.txt", "1.0 GB, too large for a document")
    ]


def test_strange_names(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No markup, no control characters, bytes that are no UTF-8: on the terminal and in the files."""
    root = tmp_path / "docs"
    root.mkdir()
    for binary in (b"[red]x.bin", b"new\nline.bin", b"\x1b[31m.bin", b"\xff.bin"):
        Path(os.fsdecode(bytes(root) + b"/" + binary)).write_bytes(b"\0")
    Path(os.fsdecode(bytes(root) + b'/\xfe,".txt')).write_text("the hand")
    outputs = tmp_path / "out.json", tmp_path / "out.csv"
    assert main(command(tiny_model, root, "--json", outputs[0], "--csv", outputs[1])) == 0
    shown = capsys.readouterr().out
    for name in ("[red]x.bin", "new\ufffdline.bin", "\ufffd[31m.bin", "\ufffd.bin"):
        assert name in shown
    assert "\x1b" not in shown
    assert json.loads(outputs[0].read_text())["documents"][0]["path"] == '\ufffd,".txt'
    with outputs[1].open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 5


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda root: None, "No such file"),
        (lambda root: root.write_text("a file"), "Not a directory"),
        (Path.mkdir, "there is no file in this folder"),
        (lambda root: (root / "empty" / "deep").mkdir(parents=True), "there is no file in this folder"),
        (write_unreadable, "none of its 6 files is a document that can be read; the first is bad/broken.pdf"),
    ],
)
def test_folders_without_a_document(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], make: Any, text: str
) -> None:
    root = tmp_path / "docs"
    make(root)
    output = tmp_path / "out.json"
    assert main(command(tiny_model, root, "--json", output)) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"pyllm: error: {root}: ")
    assert shown.err.count("\n") == 1
    assert text in shown.err
    assert not output.exists()
    with pytest.raises((DocumentError, FileError)):
        folder.survey(root, len)


# ---- shares ----


def test_assumed_shares() -> None:
    assert assumed("a=b=12.5") == Share("a=b", 0.125, 0.125, "a=b assumed")
    for text in ("", "x", "=5", "x=", "x=y", "x=-1", "x=nan", "x=inf", "x=201"):
        with pytest.raises(ArgumentError, match="NAME=PERCENT"):
            assumed(text)
    for text in ("dense=5", "window=0"):
        with pytest.raises(ArgumentError, match="is known, and stands beside the others"):
            assumed(text)
    mine = Share("window", 0.1, 0.1, "mine")
    assert combined([mine]) == [BOUNDS[0], mine]


@pytest.fixture
def rows(tmp_path: Path, tiny_model: Path) -> Path:
    """What `pyllm eval` measured with the tiny model on two texts."""
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for i, path in enumerate(texts):
        path.write_text(prose(600, i))
    path = tmp_path / "rows.json"
    fixed = ("eval", tiny_model, "--window", WINDOW, "--sinks", SINKS, "--ctx", 300, "--decode", 4)
    asked = ("--policies", "window,adaptive", "--thresholds", "0.6", "--json", path)
    assert main([str(x) for x in (*fixed, *asked, "--text", *texts)]) == 0
    return path


def test_measured_shares(rows: Path, tiny_model: Path) -> None:
    model = ModelFile.open(tiny_model)
    found = {share.name: share for share in measured(rows, model, WINDOW, SINKS)}
    assert list(found) == ["window", "adaptive head 0.6", "adaptive group 0.6"]
    kept = [row for row in json.loads(rows.read_text())["rows"] if row["line"] == "adaptive group"]
    assert len(kept) == 2
    group = found["adaptive group 0.6"]
    assert group.read == pytest.approx(np.mean([row["decode_bulk_read"] for row in kept]) / 100)
    assert group.work == pytest.approx(np.mean([row["bulk_work"] for row in kept]) / 100)
    assert group.kl == pytest.approx(np.mean([row["kl"] for row in kept]))
    assert "rows.json" in group.source
    assert (found["window"].read, found["window"].work) == (0, 0)


def test_rows_of_something_else(rows: Path, tiny_model: Path, tmp_path: Path) -> None:
    model = ModelFile.open(tiny_model)
    other = ModelFile.open(write_tiny(tmp_path / "other.gguf", tokenizer=True, seed=1))
    for arguments, text in (
        ((other, WINDOW, SINKS), "model sha256"),
        ((model, WINDOW + 1, SINKS), "window 64, but here it is 65"),
        ((model, WINDOW, 0), "sinks 4, but here it is 0"),
    ):
        with pytest.raises(ArgumentError, match=f"{re.escape(str(rows))}: .*{text}"):
            measured(rows, *arguments)
    empty = json.loads(rows.read_text()) | {"rows": []}
    rows.write_text(json.dumps(empty))
    with pytest.raises(FormatError, match="without any row"):
        measured(rows, model, WINDOW, SINKS)
    with pytest.raises(FileError, match="nosuch"):
        measured(tmp_path / "nosuch", model, WINDOW, SINKS)


def test_presets_of_a_profile_beside_the_model(
    tiny_model: Path, mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copy(tiny_model, tmp_path / "m.gguf"))
    assert presets(ModelFile.open(model), 1024, 16) == []
    policies = {name: replace(policy, window=WINDOW, sinks=SINKS) for name, policy in POLICIES.items()}
    profile_of(ModelFile.open(model).fingerprint, policies).save(beside([model]))
    found = presets(ModelFile.open(model), WINDOW, SINKS)
    assert [share.name for share in found] == list(PRESETS)
    assert {(share.read, share.work, share.kl) for share in found} == {(0.12, 0.2, 0.004)}
    assert presets(ModelFile.open(model), 1024, 16) == []
    assert main(command(model, mixed)) == 0
    shown = capsys.readouterr().out
    assert "balanced" in shown
    assert "m.profile" in shown
    for spoil, cause in (
        (lambda path: path.write_text("broken"), "not a profile"),
        (profile_of("0" * 16).save, "a profile of another model"),
    ):
        spoil(beside([model]))
        assert main(command(model, mixed)) == 0
        output = capsys.readouterr()
        assert "balanced" not in output.out
        assert f"pyllm: without presets: {beside([model])}: {cause}" in output.err


# ---- the command ----


def test_from_end_to_end(
    mixed: Path, tiny: LLM, tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "png")}
    asked = ("--rows", rows, "--assume", "half=50", "--ctx", "700", "--measure", "--threads", "1")
    kept = ("--json", outputs["json"], "--csv", outputs["csv"], "--plot", outputs["png"])
    assert main(command(tiny_model, mixed, *asked, *kept)) == 0
    shown = capsys.readouterr().out

    counts = {}
    for path in mixed.rglob("*.*"):
        text = documents.read(path)
        counts[path.relative_to(mixed).as_posix()] = len(tiny.tokenize(text, parse_special=False))
    content = json.loads(outputs["json"].read_text())
    assert {one["path"]: one["tokens"] for one in content["documents"]} == counts
    lengths = content["lengths"]
    assert lengths["documents"] == 5
    assert lengths["tokens"] == sum(counts.values())
    assert lengths["percentiles"]["50"] == np.median(list(counts.values()))
    assert lengths["beyond_context"] == sum(n > 700 for n in counts.values()) > 0
    assert lengths["beyond_window"] == sum(n >= WINDOW + SINKS + 64 for n in counts.values()) > 0

    policies = {one["share"]["name"]: one for one in content["policies"]}
    assert list(policies) == ["dense", "window", "adaptive head 0.6", "adaptive group 0.6", "half"]
    assert (policies["dense"]["kv_percent"], policies["dense"]["work_percent"]) == (100, 100)
    for figure in ("kv_bytes", "work_percent"):
        values = [policies[name][figure] for name in ("window", "half", "dense")]
        assert values[0] < values[1] == pytest.approx((values[0] + values[2]) / 2)
    assert all(one["prefill_seconds"] > 0 and one["decode_ms"] > 0 for one in content["policies"])
    for text in (*policies, "prefill s", "rows.json", f"{sum(counts.values()):,} tokens"):
        assert text in shown
    assert "…" not in shown

    with outputs["csv"].open(newline="") as file:
        table = {row["path"]: row for row in csv.DictReader(file)}
    assert {path: int(row["tokens"]) for path, row in table.items()} == counts
    image = imread(outputs["png"])[..., :3]
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10


def test_nothing_is_timed_unasked(mixed: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tiny_model, mixed)) == 0
    shown = capsys.readouterr().out
    assert "nothing was timed" in shown
    assert "decode ms" not in shown


def test_weights_are_not_needed(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model whose weights are broken still has a tokenizer."""
    path = write_tiny(tmp_path / "nan.gguf", tokenizer=True)
    data = bytearray(path.read_bytes())
    data[-400_000:] = b"\xff" * 400_000
    path.write_bytes(data)
    assert main(command(path, mixed)) == 0
    assert main(command(path, mixed, "--measure")) == 1
    assert "nan.gguf" in capsys.readouterr().err


BAD = [
    (["--model", "nosuch"], "nosuch"),
    (["--ctx", "0"], "--ctx: expected 1 to 4096, the model's context, got 0"),
    (["--ctx", "4097"], "--ctx"),
    (["--window", "0"], "window"),
    (["--sinks", "65"], "sinks"),
    (["--rows", "nosuch.json"], "nosuch.json"),
    (["--rows", "/"], "/: the results cannot be read"),
    (["--json", "/nosuch/out.json"], "/nosuch/out.json: cannot be written"),
    (["--plot", "plot.gif"], ".png, .svg, .pdf"),
    (["--measure", "--ctx", "10"], "too short to measure"),
    (["--measure", "--threads", "0"], "n_threads"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD)
def test_bad_input_is_one_line(
    mixed: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert main(command(tiny_model, mixed, *arguments)) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("pyllm: error: ")
    assert shown.err.count("\n") == 1
    assert text in shown.err


@pytest.mark.parametrize("command_name", ["survey", "pilot"])
def test_an_empty_name_is_no_folder(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], command_name: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command_name, "", "--model", str(tiny_model)])
    assert exit_.value.code == 2
    assert "argument DIR: expected a folder, got an empty name" in capsys.readouterr().err


def test_shares_that_are_none(mixed: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(command(tiny_model, mixed, "--assume", "x"))
    assert exit_.value.code == 2
    assert "NAME=PERCENT" in capsys.readouterr().err
