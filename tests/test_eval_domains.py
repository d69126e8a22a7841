"""`pyllm eval` over domains and positional encodings: the dialogue, the worst domain, files side by side."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from pyllm import LLM
from pyllm.cli import main
from pyllm.evaluate import dialogue, domains, frontier, texts
from pyllm.evaluate.results import Results, Row
from tiny_models import RopeScaling, write_tiny

# ---- the dialogue ----


def test_a_conversation_is_the_evaluated_half_of_the_reference() -> None:
    messages = dialogue.conversation()
    assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    assert all(message["content"].strip() for message in messages)
    assert not re.search(r"<\||\{topic\}|\{said\}", " ".join(m["content"] for m in messages[::2]))
    answers = "\n\n".join(message["content"] for message in messages[1::2])
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    words = [words for name in sorted(topics)[::2] for words in topics[name].split()]
    assert answers.split() == words
    questions = {message["content"] for message in messages[::2]}
    assert len(questions) > 100
    assert sum("Earlier you said" in question for question in questions) > 20


def test_what_was_said_was_said() -> None:
    messages = dialogue.conversation()
    for before, question in zip(messages[1::2], messages[2::2], strict=False):
        quoted = re.findall("“(.*)”", question["content"])
        if question["content"].startswith("Earlier"):
            assert quoted[0] in " ".join(before["content"].split())


def test_dialogue_in_chat_tokens(tiny: LLM) -> None:
    found = dialogue.excerpt(tiny, 3000, seed=1)
    assert (found.name, str(found.tokens.dtype), len(found.tokens)) == ("dialogue", "int32", 3000)
    shown = tiny.detokenize(found.tokens)
    assert shown.startswith("<|im_start|>user\n")
    assert shown.count("<|im_end|>\n<|im_start|>assistant\n") > 1
    marks = tiny.tokenize("<|im_start|><|im_end|>")
    assert len(marks) == 2
    assert all((found.tokens == mark).sum() > 2 for mark in marks)
    assert np.array_equal(dialogue.excerpt(tiny, 3000, seed=1).tokens, found.tokens)
    others = [dialogue.excerpt(tiny, 3000, seed=seed).tokens for seed in range(2, 8)]
    assert any(not np.array_equal(other, found.tokens) for other in others)


def test_dialogue_without_a_chat_template(tiny: LLM) -> None:
    tiny.metadata.pop("tokenizer.chat_template")
    shown = tiny.detokenize(dialogue.excerpt(tiny, 2000, seed=0).tokens)
    assert shown.startswith("User: ")
    assert "\n\nAssistant: " in shown


def test_what_is_fitted_shares_nothing_with_what_is_evaluated() -> None:
    fitted = texts.builtin(fitted=True)["prose"]
    said = "\n\n".join(message["content"] for message in dialogue.conversation()[1::2])
    for evaluated in (texts.builtin()["prose"], said):
        paragraphs = {paragraph for paragraph in re.split(r"\n\s*\n", evaluated) if len(paragraph) > 150}
        assert len(paragraphs) > 400
        assert not [paragraph for paragraph in paragraphs if paragraph in fitted]


# ---- the worst domain ----

ROW = Row(
    "prose", "window", None, 99, 0.1, 0.05, 0.15, 90.0, 9.0, 8.9, 100.0, 0.0, 0.0, 1.0, 1.0, 0, *[None] * 4
)


def row(line: str, text: str, kl: float, low: float | None, high: float | None) -> Row:
    return replace(ROW, line=line, text=text, kl=kl, kl_low=low, kl_high=high)


def test_the_worst_text_of_each_policy() -> None:
    rows = [
        row("dense", "prose", 0, 0, 0),
        row("dense", "code", 0, 0, 0),
        row("window", "prose", 0.1, 0.05, 0.15),
        row("window", "code", 0.3, 0.2, 0.4),
        row("static", "prose", 0.3, 0.1, 0.5),
        row("static", "code", 0.2, 0.1, 0.3),
        row("short", "prose", 0.3, None, None),
        row("short", "code", 0.1, None, None),
        row("alone", "code", 0.1, 0.1, 0.1),
    ]
    found = domains.worst(rows)
    assert found == [
        domains.Worst("window", "code", True),
        domains.Worst("static", "prose", False),
        domains.Worst("short", "prose", False),
    ]
    assert domains.sentences(found) == [
        "furthest from dense on code: window",
        "furthest from dense on prose: static?, short?",
    ]


# ---- the plot ----


def test_a_line_is_the_same_in_all_panels() -> None:
    """Here the first text lacks a line, and another reads more than dense attention does."""
    of_read = {"window": 0.0, "static": 60.0, "pages": 117.0}
    rows = [
        replace(row(line, text, 0.1, 0.05, 0.2), bulk_read=read)
        for text, lines in (("$^$.txt", ["static", "pages"]), ("code", ["pages", "window"]))
        for line, read in of_read.items()
        if line in lines
    ]
    figure = frontier.draw(rows)
    left, right = figure.axes
    assert left.get_title() == "$^$.txt"
    assert all(panel.get_xlim()[1] > 117 for panel in figure.axes)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["static", "pages", "window"]
    # (colour, marker) of every line of points in a panel
    static, pages = (line.get_color() for line in left.lines)
    assert [line.get_color() for line in right.lines] == [pages, right.lines[1].get_color()]
    assert len({static, pages, right.lines[1].get_color()}) == 3
    assert left.lines[1].get_marker() == right.lines[0].get_marker()
    assert frontier.plot(rows, "svg")
    # Decode has panels of its own where it had tokens enough, with the same colours.
    decoded = [
        replace(row, decode_tokens=256 if row.line == "pages" else 8, decode_kl=0.2, decode_bulk_read=120.0)
        for row in rows
    ]
    figure = frontier.draw(decoded)
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == ["$^$.txt", "code", "$^$.txt in decode", "code in decode"]
    assert all([line.get_color() for line in panel.lines] == [pages] for panel in figure.axes[2:])
    assert all(panel.get_xlim()[1] > 120 for panel in figure.axes)


def test_names_that_are_markup_or_no_text(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file may have any name, which every output shows or replaces what it cannot."""
    names = {b"$^$ [bold]x.txt": "$^$ [bold]x.txt", b"[b]\xff.txt": "[b]\ufffd.txt"}
    for name in names:
        (tmp_path / os.fsdecode(name)).write_text("the hand and the inner thing\n" * 60)
    made, csv = tmp_path / "rows.json", tmp_path / "rows.csv"
    outputs = ["--csv", str(csv), "--plot", str(tmp_path / "plot.png")]
    named = [tmp_path / os.fsdecode(name) for name in names]
    assert evaluate(tiny_model, made, "--text", *named, *outputs) == 0
    shown = capsys.readouterr().out
    assert {row.text for row in Results.read(made).rows} == set(names.values())
    assert compare([made, made]) == 0
    compared = capsys.readouterr().out
    for expected in names.values():
        assert f"{expected}: " in shown
        assert f"\n{expected} " in compared
        assert expected in csv.read_text("utf-8")


# ---- several models ----

ROPES = {
    "plain": {"rope_base": 10000.0},
    "wide": {"rope_base": 500000.0},
    "linear": {"rope_scaling": RopeScaling("linear", 4.0)},
    "yarn": {"rope_base": 100000.0, "rope_scaling": RopeScaling("yarn", 2.0, original_context=2048)},
    "freqs": {"rope_freqs": np.linspace(1.0, 8.0, 16)},
}
SHOWN = {
    "plain": "RoPE base 10,000, scaling none",
    "wide": "RoPE base 500,000, scaling none",
    "linear": "RoPE base 10,000, scaling linear 4",
    "yarn": "RoPE base 100,000, scaling yarn 2",
    "freqs": "RoPE base 10,000, scaling by frequency",
}


def evaluate(model: Path, result: Path, *arguments: str | Path) -> int:
    fixed = (
        "eval",
        model,
        "--json",
        result,
        "--ctx",
        "300",
        "--window",
        "64",
        "--sinks",
        "4",
        "--decode",
        "0",
    )
    return main(
        [str(x) for x in (*fixed, "--policies", "window,adaptive", "--thresholds", "0.9", *arguments)]
    )


def compare(paths: Sequence[Path]) -> int:
    return main(["eval", "--compare", *map(str, paths)])


def test_models_of_different_positional_encodings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name, options in ROPES.items():
        model = write_tiny(tmp_path / f"{name}.gguf", tokenizer=True, sharp=4.0, **options)  # type: ignore[arg-type]
        files.append(tmp_path / f"{name}.json")
        assert evaluate(model, files[-1]) == 0
        shown = capsys.readouterr().out
        for domain in ("prose", "code", "dialogue"):
            assert f"{domain}: " in shown
        assert "furthest from dense on " in shown
        rows = Results.read(files[-1]).rows
        worst = json.loads(files[-1].read_text())["worst_text"]
        assert worst.keys() == {row.name for row in rows if row.kl > 0} >= {"window"}
        for policy, text in worst.items():
            assert max((row for row in rows if row.name == policy), key=lambda row: row.kl).text == text

    assert compare(files) == 0
    shown = capsys.readouterr().out
    for letter, (name, expected) in zip("ABCDE", SHOWN.items(), strict=True):
        assert f"{letter}: {name}, {expected}, 300 tokens, window 64 ({tmp_path / name}.json)" in shown
        assert f"\n{letter}: furthest from dense on " in shown
    table = [line.split() for line in shown.splitlines() if line.startswith(("prose", "code", "dialogue"))]
    assert len(table) == 9
    found = [Results.read(path).rows for path in files]
    for cells in table:
        key, kl = cells[: -3 * len(files)], cells[-3 * len(files) :: 3]
        assert [f"{row.kl:.4f}" for of in found for row in of if [row.text, *row.name.split()] == key] == kl
    assert len({row.kl for of in found for row in of if row.name == "window"}) == 3 * len(files)


def test_files_that_cannot_be_compared(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prose, code = tmp_path / "prose.txt", tmp_path / "code.txt"
    for path in (prose, code):
        path.write_text("the hand and the inner thing\n" * 60)
        assert evaluate(tiny_model, path.with_suffix(".json"), "--text", path) == 0
    files = [path.with_suffix(".json") for path in (prose, code)]
    broken, missing = tmp_path / "broken.json", tmp_path / "missing.json"
    broken.write_text("{}")
    capsys.readouterr()
    for paths, cause in (
        (files, "no policy on no text in common"),
        (files[:1], "no policy on no text in common"),
        ([files[0], broken], f"{broken}: not the results"),
        ([files[0], missing], f"{missing}: the results cannot be read"),
    ):
        assert compare(paths) == 1
        shown = capsys.readouterr()
        assert (shown.out, shown.err.count("\n")) == ("", 1)
        assert cause in shown.err


def test_files_of_before_positions_were_kept(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.json"
    assert evaluate(tiny_model, path) == 0
    content = json.loads(path.read_text())
    for name in ("rope base", "rope scaling"):
        del content["settings"][name]
    older = tmp_path / "older.json"
    older.write_text(json.dumps(content))
    capsys.readouterr()
    assert compare([path, path, older]) == 0
    assert "C: tiny, RoPE base unknown, scaling unknown" in capsys.readouterr().out
