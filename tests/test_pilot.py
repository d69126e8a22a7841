"""`pyllm pilot`: the sample, the choice, the heads, and the report as a page that stands alone."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from bs4 import BeautifulSoup, Tag
from hypothesis import given
from hypothesis import strategies as st

from folders import prose, write_documents, write_unreadable
from pyllm import LLM, Adaptive, ArgumentError, Dense, Oracle, Window
from pyllm.attention import PRESETS
from pyllm.cli import main
from pyllm.evaluate.results import Row
from pyllm.evaluate.texts import Text
from pyllm.pilot.calibration import others
from pyllm.pilot.choice import cost, loss, pool, recommend
from pyllm.pilot.figures import spread
from pyllm.pilot.heads import PROMISE, Heads, observe
from pyllm.pilot.pilot import by_kind, halves, spelled
from pyllm.pilot.sample import cut_at, draw
from pyllm.profile import Profile
from pyllm.survey.folder import Document, Folder
from pyllm.survey.folder import survey as survey_folder
from test_profile import profile_of

WINDOW, SINKS = 64, 4
SVG = "{http://www.w3.org/2000/svg}"


# ---- the sample ----


@given(st.lists(st.integers(1, 500), min_size=1, max_size=12), st.integers(1, 3000))
def test_cut_at_is_the_longest_that_fits(lengths: list[int], limit: int) -> None:
    cut = cut_at(lengths, limit)
    if sum(lengths) <= limit:
        assert cut == max(lengths)
    else:
        assert sum(min(n, cut) for n in lengths) <= limit < sum(min(n, cut + 1) for n in lengths)


@pytest.fixture
def documents(tmp_path: Path, tiny: LLM) -> Folder:
    """Twelve documents of growing length, the first three too short to be of use."""
    root = tmp_path / "twelve"
    root.mkdir()
    for i in range(12):
        (root / f"{i:02}.txt").write_text("x" * (40 + 40 * i))
    return survey_folder(root, lambda text: len(tiny.tokenize(text)))


def test_sample_has_every_class_of_length(documents: Folder, tiny: LLM) -> None:
    found = draw(tiny, documents, n_ctx=4096, limit=1000, least=150, seed=3)
    # Nine are long enough, of 321 tokens in the mean: three classes of three.
    numbers = [int(text.name[:2]) for text in found]
    assert [(n - 3) // 3 for n in numbers] == [0, 1, 2]
    assert sum(len(text.tokens) for text in found) <= 1000
    for text in found:
        whole = tiny.tokenize((documents.root / text.name).read_text() + "\n")
        assert list(text.tokens) == whole[: len(text.tokens)]
        assert len(text.tokens) >= 150
    again = draw(tiny, documents, n_ctx=4096, limit=1000, least=150, seed=3)
    assert [text.name for text in again] == [text.name for text in found]
    others = {
        text.name
        for seed in range(9)
        for text in draw(tiny, documents, n_ctx=4096, limit=1000, least=150, seed=seed)
    }
    assert len(others) > 3


def test_sample_is_cut_to_the_context_and_the_limit(documents: Folder, tiny: LLM) -> None:
    found = draw(tiny, documents, n_ctx=200, limit=10**6, least=150, seed=0)
    assert [text.name for text in found] == [f"{i:02}.txt" for i in range(3, 12)]
    assert [len(text.tokens) for text in found] == [161, *[200] * 8]
    two = draw(tiny, documents, n_ctx=4096, limit=310, least=150, seed=0)
    assert [len(text.tokens) for text in two] == [155, 155]
    (only,) = draw(tiny, documents, n_ctx=4096, limit=160, least=150, seed=0)
    assert len(only.tokens) == 160


def test_samples_that_cannot_be_drawn(documents: Folder, tiny: LLM) -> None:
    fixed = {"n_ctx": 4096, "limit": 1000, "least": 150, "seed": 0}
    for changed, text in (
        ({"least": 500}, "the longest has 481 tokens, and only from 500 tokens on"),
        ({"n_ctx": 149}, "--ctx: 149 tokens"),
        ({"limit": 149}, "--limit: 149 tokens"),
    ):
        with pytest.raises(ArgumentError, match=text):
            draw(tiny, documents, **(fixed | changed))


def test_presets_see_other_documents_than_those_reported_on(documents: Folder) -> None:
    held_out = [f"{i:02}.txt" for i in range(3, 12)]
    found = others(documents, held_out, 10**6, seed=0)
    assert found == {f"{i:02}.txt": "x" * (40 + 40 * i) + "\n" for i in range(3)}
    assert len(others(documents, held_out, 100, seed=0)) < 3
    orders = {tuple(others(documents, [], 10**6, seed)) for seed in range(5)}
    assert len(orders) == 5


def test_halves() -> None:
    texts = [Text(name, np.zeros(1, np.int32)) for name in "abcde"]
    assert halves(texts) == (["a", "c", "e"], ["b", "d"])
    assert halves(texts[:1]) == (["a"], ["a"])


# ---- the choice ----


def row(line: str, kl: float, work: float, read: float, **changed: object) -> Row:
    found = Row(
        text="a.txt",
        line=line,
        setting=None,
        tokens=100,
        kl=kl,
        kl_low=kl / 2,
        kl_high=2 * kl,
        top1=90.0,
        perplexity=8.0,
        dense_perplexity=4.0,
        heads_local=10.0,
        bulk_work=work,
        bulk_read=50.0,
        prefill_seconds=1.0,
        dense_prefill_seconds=2.0,
        decode_tokens=4,
        decode_kl=0.4 * kl,
        decode_bulk_read=read,
        decode_ms=1.0,
        dense_decode_ms=2.0,
    )
    return replace(found, **changed)  # type: ignore[arg-type]


DENSE = row("dense", 0.0, 100, 100)
BUDGET = 1.0  # nats, with which the made report recommends pages


def test_recommends_the_cheapest_within_the_budget() -> None:
    rows = [
        DENSE,
        row("window", 0.5, 0, 0),
        row("over by its interval", 0.004, 10, 10),
        row("over in decode", 0.002, 11, 11, decode_kl=0.0021),
        row("cheapest", 0.002, 30, 10),
        row("cheaper in prefill", 0.002, 10, 40),
    ]
    found = recommend(rows, 0.005)
    assert found.row.line == "cheapest"
    assert found.kept
    assert (loss(found.row), cost(found.row)) == (0.004, 20)


def test_names_the_nearest_where_nothing_keeps_to_the_budget() -> None:
    found = recommend([DENSE, row("window", 0.5, 0, 0), row("adaptive", 0.01, 50, 50)], 0.005)
    assert found.row.line == "adaptive"
    assert not found.kept


def test_pooled_rows() -> None:
    one = row("adaptive", 0.001, 10, 20)
    two = row("adaptive", 0.004, 40, 50, text="b.txt", tokens=300, kl_low=None, kl_high=None, perplexity=16.0)
    found = pool([one, two])
    assert found.text == "2 documents"
    assert found.tokens == 400
    assert found.kl == pytest.approx((0.001 + 3 * 0.004) / 4)
    assert (found.kl_low, found.kl_high) == (0.0005, 0.002)
    assert found.bulk_work == pytest.approx((10 + 3 * 40) / 4)
    assert found.perplexity == pytest.approx(8 ** (1 / 4) * 16 ** (3 / 4))
    assert (found.prefill_seconds, found.dense_prefill_seconds, found.decode_tokens) == (2, 4, 8)
    # What is measured of one document only may not hide the other's loss.
    assert loss(found) == pytest.approx(found.kl)


def test_kinds_come_worst_first() -> None:
    rows = [
        row("adaptive", kl, 1, 1, text=name)
        for name, kl in (("b/x.MD", 0.1), ("y.md", 0.3), ("z.b/README", 0.5), ("v.txt", 0.0))
    ]
    found = by_kind(rows)
    assert [one.text for one in found] == ["without suffix", "md", "txt"]
    assert found[1].kl == pytest.approx(0.2)


# ---- the heads ----


def noise(n: int, name: str = "noise") -> Text:
    return Text(name, np.random.default_rng(len(name)).integers(0, 256, n).astype(np.int32))


def seen(llm: LLM, policy: Adaptive | Dense | Oracle | Window, n: int = 400) -> Heads:
    ticks: list[tuple[int, int]] = []
    found = observe(llm, [noise(n), noise(n, "other")], policy, 1, lambda *tick: ticks.append(tick))
    assert ticks[-1] == (2 * n, 2 * n)
    return found


def test_the_oracle_misses_nothing(tiny: LLM) -> None:
    found = seen(tiny, Oracle(PROMISE, "head", window=WINDOW, sinks=SINKS))
    np.testing.assert_array_equal(~found.local, found.local_share < PROMISE)
    assert (found.miss_rate, found.page_miss_rate) == (0, 0)
    assert found.lost_99 <= 1 - PROMISE + 1e-5
    np.testing.assert_array_equal(found.truly_long, found.called_long)


def test_a_window_loses_what_it_does_not_read(tiny: LLM) -> None:
    found = seen(tiny, Window(window=WINDOW, sinks=SINKS))
    np.testing.assert_allclose(found.lost, 1 - found.local_share, atol=1e-5)
    assert found.local.all()
    assert found.miss_rate == pytest.approx(found.truly_long.mean())
    assert found.miss_rate > 0.5  # random text and random weights: attention is spread evenly
    assert found.lost_mean > 0.1


def test_dense_attention_loses_nothing(tiny: LLM) -> None:
    found = seen(tiny, Dense(window=WINDOW, sinks=SINKS))
    assert found.called_long.all()
    assert (found.miss_rate, found.page_miss_rate) == (0, 0)
    assert found.lost.max() < 1e-5


def test_audited_queries_are_drawn_by_the_seed(tiny: LLM) -> None:
    policy = Adaptive(0.6, window=WINDOW, sinks=SINKS)
    one, same, other = (
        observe(tiny, [noise(900)], policy, seed, lambda *_: None).local_share for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert one.shape[1:] == (2, 8)
    assert 100 < len(one) < 400
    assert one.shape != other.shape or not np.array_equal(one, other)
    assert not np.isnan(one).any()


def test_heads_that_are_drawn_span_all_rates() -> None:
    rates = np.array([[0.5, 0.1, 0.9], [0.2, 0.4, 0.0]])
    assert spread(rates, 3) == [(1, 2), (1, 0), (0, 2)]
    assert len(spread(rates, 50)) == 6


# ---- the report ----

NOT_MARKUP = "<b>&amp;.txt"


def mixed_folder(folder: Path) -> Path:
    root = folder / "<docs>"
    write_documents(root, 400)
    write_unreadable(root)
    (root / "b" / NOT_MARKUP).write_text(prose(300, 7))
    return root


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return mixed_folder(tmp_path)


def command(model: Path, root: Path, output: Path, *arguments: str | Path) -> list[str]:
    fixed = ("pilot", root, "--model", model, "--window", WINDOW, "--sinks", SINKS, "--output", output)
    return [str(x) for x in (*fixed, "--limit", 1500, "--decode", 4, *arguments)]


def table(page: BeautifulSoup, name: str) -> dict[str, list[str]]:
    """Cells of each row behind its first one."""
    found = page.find("table", id=name)
    assert isinstance(found, Tag)
    rows = [[cell.get_text(" ", strip=True) for cell in line.find_all("td")] for line in found.find_all("tr")]
    return {cells[0]: cells[1:] for cells in rows if cells}


def text_of(page: BeautifulSoup, name: str) -> str:
    found = page.find(id=name)
    assert isinstance(found, Tag)
    return " ".join(found.get_text().split())


def images(page: BeautifulSoup) -> dict[str, ElementTree.Element]:
    found = {}
    for image in page.find_all("img"):
        head, _, data = str(image["src"]).partition(",")
        assert head == "data:image/svg+xml;base64"
        found[str(image["alt"])] = ElementTree.fromstring(base64.b64decode(data, validate=True))
    return found


def marks(svg: ElementTree.Element, prefix: str) -> int:
    """Elements in those groups that matplotlib names so."""
    return sum(
        len(list(group.iter())) - 1 for group in svg.iter(f"{SVG}g") if group.get("id", "").startswith(prefix)
    )


KPIS = {
    "Quality kept: KL": r"0\.\d{4} nats( \(up to 0\.\d{4}\))?",
    "Quality kept: top-1": r"\d+\.\d\d %",
    "Quality kept: perplexity": r"[\d.]+ against [\d.]+",
    "Bytes saved in decode": r"\d+\.\d % of the KV cache's, \d+\.\d % with weights",
    "Work saved in prefill": r"-?\d+\.\d %",
    "Time saved in prefill": r"-?\d+\.\d %",
    "Time saved in decode": r"-?\d+\.\d %",
    "Miss rate": r"\d+\.\d{3} % of [\d,]+",
    "Page miss rate": r"\d+\.\d{3} % of [\d,]+",
    "Lost share": r"\d+\.\d\d % in the mean, \d+\.\d\d % at most for 99 %",
}


@dataclass(frozen=True)
class Made:
    """A finished pilot: its page, the rows that it kept, and the command that makes it again."""

    page: BeautifulSoup
    rows: list[Row]
    kept: Path
    output: Path
    command: list[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Made:
    folder = tmp_path_factory.mktemp("pilot")
    root, output, kept = mixed_folder(folder), folder / "report.html", folder / "rows.json"
    asked = ("--json", kept, "--limit", "3000", "--budget-kl", f"{BUDGET}", "--seed", "5", "--no-calibrate")
    line = command(tiny_model, root, output, *asked)
    assert main(line) == 0
    page = BeautifulSoup(output.read_text("utf-8"), "html.parser")
    rows = [Row(**values) for values in json.loads(kept.read_text())["rows"]]
    return Made(page, rows, kept, output, line)


def test_the_report_stands_alone(made: Made) -> None:
    assert not made.page.find_all(["script", "link", "iframe", "object", "embed", "base"])
    for tag in made.page.find_all(True):
        for name, value in tag.attrs.items():
            assert name not in ("href", "srcset", "action", "background", "data"), tag
            assert name != "src" or str(value).startswith("data:"), tag
    assert not re.search(r"url\(|@import", str(made.page.style))


def test_every_figure_shows_something(made: Made) -> None:
    figures = images(made.page)
    assert len(figures) == 5
    assert marks(figures["Histogram of document lengths in tokens"], "patch_") >= 5
    assert marks(figures["KL to dense attention against bulk bytes read, per policy"], "line2d_") > 50
    assert marks(figures["Distribution of the window's true share for some heads"], "patch_") > 50
    scores = figures["Distribution of the scores of the window against the whole for some heads"]
    assert marks(scores, "patch_") > 100
    heat = figures["Long-head rate by layer and head"]
    assert len(list(heat.iter(f"{SVG}image"))) >= 2  # the two maps; the colour scale is one too


def test_every_key_figure_has_a_number_and_a_definition(made: Made) -> None:
    kpis = table(made.page, "kpis")
    assert kpis.keys() == KPIS.keys()
    for name, (value, definition) in kpis.items():
        assert re.fullmatch(KPIS[name], value), (name, value)
        assert len(definition) > 50


def test_the_tables_say_what_was_measured(made: Made) -> None:
    policies = table(made.page, "policies")
    assert {one.name for one in made.rows} == set(policies)
    for name, cells in policies.items():
        pooled = pool([one for one in made.rows if one.name == name])
        assert cells[:2] == [f"{pooled.kl:.4f}", f"{pooled.top1:.1f}"]
        assert cells[-1] == f"{cost(pooled):.1f}"


def test_the_recommended_policy_and_where_it_is_worst(made: Made) -> None:
    best = made.page.find("tr", class_="chosen")
    assert isinstance(best, Tag)
    assert best.td
    name = best.td.get_text()
    assert name in text_of(made.page, "recommendation")
    names = list(dict.fromkeys(one.text for one in made.rows))
    tuned = [one for one in made.rows if one.text in names[0::2]]
    assert name == recommend(tuned, BUDGET).row.name
    of_best = sorted((one for one in made.rows if one.name == name), key=lambda one: -one.kl)
    assert len(of_best) > 2
    assert list(table(made.page, "documents")) == [one.text for one in of_best]
    assert of_best[0].text in text_of(made.page, "worst")
    assert f"b/{NOT_MARKUP}" in {one.text for one in of_best}
    assert not made.page.find_all("b")
    kl = pool([one for one in of_best if one.text in names[1::2]]).kl
    assert table(made.page, "kpis")["Quality kept: KL"][0].startswith(f"{kl:.4f} nats")


def test_unreadable_files_and_how_it_was_made(made: Made, tmp_path: Path) -> None:
    assert list(table(made.page, "unreadable")) == list(write_unreadable(tmp_path))
    found = table(made.page, "made")
    assert "--seed 5" in found["command"][0]
    assert f"'{made.command[1]}'" in found["command"][0]
    assert re.search(r"fingerprint [0-9a-f]{16}", found["model"][0])


def test_a_second_run_goes_on_from_finished_rows(made: Made) -> None:
    finished = made.kept.read_bytes()
    assert main(made.command) == 0
    assert made.kept.read_bytes() == finished
    again = BeautifulSoup(made.output.read_text("utf-8"), "html.parser")
    # Measured times are kept with the rows.
    for name in ("kpis", "policies", "documents", "projection"):
        assert table(again, name) == table(made.page, name)


def test_a_model_whose_name_is_no_text(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "$^$.txt").write_text(prose(400, 3))
    model, output = tmp_path / os.fsdecode(b"t\xff.gguf"), tmp_path / "report.html"
    shutil.copy(tiny_model, model)
    assert main(command(model, tmp_path / "docs", output, "--no-calibrate", "--limit", "200")) == 0
    page = BeautifulSoup(output.read_text("utf-8"), "html.parser")
    assert table(page, "made")["model"][0].startswith("t\ufffd, fingerprint")
    assert "$^$.txt" in text_of(page, "recommendation")


def test_a_budget_that_cannot_be_met(
    mixed: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.html"
    assert main(command(tiny_model, mixed, output, "--budget-kl", "1e-9", "--limit", "200")) == 0
    assert capsys.readouterr().out.startswith("no policy keeps to the budget; the nearest: ")
    page = BeautifulSoup(output.read_text(), "html.parser")
    text = text_of(page, "recommendation")
    assert f"Stay with dense attention: pyllm chat --model {tiny_model} --attention dense" in text
    assert "No other policy kept to the budget of 1e-09 nats" in text
    assert "one document only" in text
    assert "No presets: the texts are too short" in text
    assert not output.with_suffix(".profile").exists()


@pytest.mark.slow
def test_presets_are_searched_kept_and_taken_again(mixed: Path, tiny_model: Path, tmp_path: Path) -> None:
    for i in range(3):
        (mixed / f"{i}.txt").write_text(prose(400, 20 + i))
    output, kept = tmp_path / "report.html", tmp_path / "rows.json"
    asked = ("--budget-kl", "0.9", "--limit", "3000", "--json", kept)
    assert main(command(tiny_model, mixed, output, *asked)) == 0
    path = output.with_suffix(".profile")
    Profile.load(path, LLM(tiny_model, attention=Dense()).fingerprint)
    page = BeautifulSoup(output.read_text(), "html.parser")
    assert f"kept in {path}" in text_of(page, "calibration")
    assert list(table(page, "policies"))[-3:] == list(PRESETS)

    # A later run takes them as they are, and finds all rows finished.
    data, finished = path.read_bytes(), kept.read_bytes()
    assert main(command(tiny_model, mixed, output, *asked, "--profile", path)) == 0
    assert (path.read_bytes(), kept.read_bytes()) == (data, finished)
    again = BeautifulSoup(output.read_text(), "html.parser")
    assert "of an earlier calibration" in text_of(again, "calibration")
    assert table(again, "policies") == table(page, "policies")


def test_profiles_that_do_not_fit(
    mixed: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.profile"
    profile_of(LLM(tiny_model, attention=Dense()).fingerprint).save(path)
    asked = (tmp_path / "report.html", "--profile", path)
    assert main(command(tiny_model, mixed, *asked)) == 1
    assert (
        "preset conservative has window and sinks (1024, 16), but this pilot (64, 4)"
        in capsys.readouterr().err
    )
    profile_of("0" * 16).save(path)
    assert main(command(tiny_model, mixed, *asked)) == 1
    assert "a profile of another model" in capsys.readouterr().err
    path.unlink()
    assert main(command(tiny_model, mixed, *asked)) == 1
    assert "the profile cannot be read" in capsys.readouterr().err


def test_presets_are_named_with_their_profile() -> None:
    policy = Adaptive(0.5, window=WINDOW)
    assert spelled("balanced", policy, Path("a b.profile")) == "balanced:a b.profile"
    assert spelled("adaptive group", policy, Path("x")) == "adaptive:0.5,window=64"


BAD = [
    (["--model", "nosuch"], "nosuch"),
    (["--limit", "0"], "--limit: expected at least 1"),
    (["--limit", "100"], "--limit: 100 tokens, but a document is of use only from"),
    (["--ctx", "100"], "--ctx: 100 tokens"),
    (["--ctx", "99999"], "--ctx: expected 1 to 4096"),
    (["--window", "3000"], "no document is long enough: the longest has"),
    (["--window", "0"], "window"),
    (["--decode", "-1"], "--decode"),
    (["--seed", "-1"], "--seed"),
    (["--budget-kl", "0"], "--budget-kl"),
    (["--budget-kl", "nan"], "--budget-kl"),
    (["--output", "/nosuch/report.html"], "/nosuch/report.html: cannot be written"),
    (["--json", "/"], "/: cannot be written"),
    (["--batch", "0"], "n_batch"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD)
def test_bad_input_is_one_line(
    mixed: Path,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    text: str,
) -> None:
    output = tmp_path / "report.html"
    assert main(command(tiny_model, mixed, output, *arguments)) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("pyllm: error: ")
    assert shown.err.count("\n") == 1
    assert text in shown.err
    assert not output.exists()


def test_outputs_that_would_overwrite_each_other(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is not even listed: it is empty."""
    (tmp_path / "locked.profile").mkdir()
    for output, arguments, cause in (
        ("r.html", ["--json", "r.html"], "--output and --json are the same file"),
        ("r.profile", [], "--output and the profile beside it are the same file"),
        ("r.html", ["--json", "r.profile"], "--json and the profile beside it are the same file"),
        ("r.html", ["--profile", "r.html"], "--output and --profile are the same file"),
        ("locked.html", [], "locked.profile: cannot be written: it is a directory"),
        ("", [], "cannot be written"),
    ):
        placed = [x if x.startswith("--") else f"{tmp_path}/{x}" for x in arguments]
        assert main(command(tiny_model, tmp_path, tmp_path / output, *placed)) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert cause in error


def test_an_empty_folder(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(command(tiny_model, tmp_path / "empty", tmp_path / "report.html")) == 1
    assert "there is no file in this folder" in capsys.readouterr().err


def test_rows_of_another_sample_are_not_mixed(
    made: Made, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text(prose(500, 11))
    kept = tmp_path / "rows.json"
    kept.write_bytes(made.kept.read_bytes())
    asked = ("--json", kept, "--limit", "3000", "--seed", "5", "--no-calibrate")
    assert main(command(tiny_model, tmp_path / "docs", tmp_path / "report.html", *asked)) == 1
    assert f"{kept}: these results were made with texts" in capsys.readouterr().err


def test_a_document_is_what_the_survey_counted(documents: Folder) -> None:
    assert documents.documents[0] == Document(Path("00.txt"), 40, 41)
