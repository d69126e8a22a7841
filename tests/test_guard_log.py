"""The decision log: what it says, that it stays within its bound, and what is said of a damaged one."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllm import LLM, Adaptive, ArgumentError, FileError, FormatError, Guard, Session, UnsupportedError
from pyllm.cli import main
from pyllm.guard.audit import Audit
from pyllm.guard.controller import Control
from pyllm.guard.log import DecisionLog, bits
from pyllm.guard.log_summary import LogSummary
from pyllm.record import Record

POLICY = Adaptive([0.6, 0.0], granularity="head", window=64)


def ids(n: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 256, n)]


def guarded(llm: LLM, path: Path, **settings: Any) -> Session:
    guard = Guard(**{"audit_rate": 1 / 16, "control_period": 64, "lost_limit": 0.3, "log": path, **settings})
    return llm.session(n_ctx=1024, attention=POLICY, guard=guard)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_log_sums_up_to_the_sessions_own_statistics(tiny: LLM, tmp_path: Path) -> None:
    session = guarded(tiny, tmp_path / "log", repair=False)
    session.eval(ids(300))
    for token in ids(50, 1):
        session.eval([token])
    session.rewind(340)
    session.eval(ids(100, 2))
    summary, stats = LogSummary.of(tmp_path / "log"), session.stats
    assert stats.guard
    assert summary.header["model"] == "tiny"
    assert summary.header["fingerprint"] == tiny._file.fingerprint
    assert summary.header["policy"] == str(POLICY)
    assert summary.header["guard"]["audit_rate"] == 1 / 16
    assert summary.n_tokens == 450
    assert summary.n_bulk == 450 - 143
    assert summary.rewinds == 1
    counts = stats.layer_counts.sum(axis=0)
    assert summary.local.sum() == counts[1]
    assert (summary.n_bytes, summary.n_read) == (counts[4], counts[5])
    assert summary.tally.audits == stats.guard.audits > 0
    np.testing.assert_array_equal(summary.tally.missed, stats.guard.missed)
    np.testing.assert_allclose(summary.tally.lost_sum, stats.guard.lost_sum, atol=1e-4 * stats.guard.audits)
    first = summary.controls[0][1]
    assert first is not None
    np.testing.assert_allclose(first, np.array([0.6, 0.0]), atol=1e-4)
    positions = [position for position, _, _ in summary.controls]
    assert positions[0] == 0
    assert len(positions) > 2
    assert all(position % 64 == 0 for position in positions)


def test_audits_that_were_asked_for_are_no_draws(tiny: LLM, tmp_path: Path) -> None:
    session = guarded(tiny, tmp_path / "log", audit_rate=1 / 1000, seed=np.int64(1), repair=False)
    session.eval(ids(300))
    session.verify()
    assert [line for line in lines(tmp_path / "log") if line.get("sampled") is False]
    assert session.stats.guard
    assert LogSummary.of(tmp_path / "log").tally.audits == session.stats.guard.audits == 0


def test_decisions_are_the_records(tiny: LLM, tmp_path: Path) -> None:
    session = guarded(tiny, tmp_path / "log", control_period=1024, repair=False, log_masses=True)
    session.eval(ids(200))
    plain = tiny.session(n_ctx=1024, attention=POLICY)
    record = plain.new_record(200)
    plain.eval(ids(200), record=record)
    (entry,) = [line for line in lines(tmp_path / "log") if "tokens" in line]
    assert entry["local"][:143] == [""] * 143
    assert entry["local"][143:] == [bits(~record.is_long[:, i]) for i in range(143, 200)]
    np.testing.assert_allclose(entry["L"], record.local_mass, atol=1e-4)
    np.testing.assert_allclose(np.array(entry["M"], float), record.estimate, atol=1e-4)


def test_repairs_are_in_it(tiny: LLM, tmp_path: Path) -> None:
    session = guarded(tiny, tmp_path / "log", lost_limit=0.2)
    session.eval(ids(700))
    summary = LogSummary.of(tmp_path / "log")
    assert session.stats.guard
    assert len(summary.repairs) == session.stats.guard.repairs > 0
    for cause, first, stop, lost in summary.repairs:
        assert first <= cause < stop
        assert lost > 0.2


def test_it_stays_within_its_bound(tiny: LLM, tmp_path: Path) -> None:
    session = guarded(tiny, tmp_path / "log", log_bytes=2**16, log_masses=True)
    for token in ids(150):
        session.eval([token])
    new, old = tmp_path / "log", tmp_path / "log.1"
    assert old.stat().st_size + new.stat().st_size <= 2**16
    assert 2**14 < old.stat().st_size <= 2**15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]
    # The older half ends where the newer one begins, which says again what holds.
    parts = [LogSummary.of(path) for path in (old, new)]
    assert parts[0].header == parts[1].header
    assert parts[1].controls[0][0] == 0
    tokens = [line["tokens"] for path in (old, new) for line in lines(path) if "tokens" in line]
    assert tokens == list(range(tokens[0], 150))


def test_batches_stay_within_the_bound_too(tiny: LLM, tmp_path: Path) -> None:
    session = guarded(
        tiny, tmp_path / "log", log_bytes=2**16, log_masses=True, control_period=512, repair=False
    )
    session.eval(ids(512))
    new, old = tmp_path / "log", tmp_path / "log.1"
    assert max(path.stat().st_size for path in (new, old)) <= 2**15
    entries = [line for path in (old, new) for line in lines(path) if "tokens" in line]
    assert len(entries) > 1
    for one, other in pairwise(entries):
        assert other["tokens"] == one["tokens"] + one["n"]
    assert entries[-1]["tokens"] + entries[-1]["n"] == 512


def test_what_one_entry_cannot_fit_is_refused(tmp_path: Path) -> None:
    """What is not refused holds entries of the longest numbers there are."""
    shape, path = (40, 32), tmp_path / "log"
    header = {"n_layers": shape[0], "n_heads": shape[1]}
    with pytest.raises(
        ArgumentError, match=r"log_bytes: .* of 1280 heads and their masses, got 65536"
    ) as caught:
        DecisionLog(path, header, limit=2**16, masses=True)
    assert not path.exists()
    limit = int(re.findall("at least ([0-9]+)", str(caught.value))[0])
    log = DecisionLog(path, header, limit, masses=True)
    record = Record.empty(*shape, np.zeros(3, bool))
    longest = np.finfo(np.float32).min
    record.local_mass[:], record.estimate[:] = longest, longest
    none = np.zeros(shape, bool)
    thresholds = np.linspace(0, -longest, 1280, dtype=np.float32).reshape(shape)
    log.control(2**40, thresholds, 0.1)
    for _ in range(3):
        log.tokens(2**40, record, np.ones(3, bool), 2**60, 2**60)
        log.audit(Audit(2**40, none, none, none, np.full(shape, longest, np.float32)))
    for each in (path, tmp_path / "log.1"):
        assert each.stat().st_size <= limit // 2


def test_one_session_writes_a_file(tiny: LLM, tmp_path: Path) -> None:
    session = guarded(tiny, tmp_path / "log")
    with pytest.raises(FileError, match="log: another session"):
        guarded(tiny, tmp_path / "log")
    session.guard = None
    assert guarded(tiny, tmp_path / "log").guard
    with pytest.raises(FileError, match="nowhere"):
        guarded(tiny, tmp_path / "nowhere" / "log")


def test_another_policy_is_in_it(tiny: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    session = guarded(tiny, path, log_bytes=2**16, log_masses=True)
    session.eval(ids(200))
    for policy in ("dense", "adaptive:0.5,window=64"):
        session.attention = policy
    assert LogSummary.of(path).policies == []  # nothing was evaluated under them
    session.eval(ids(50, 1))
    summary = LogSummary.of(path)
    assert summary.policies == [(200, "adaptive:0.5,window=64")]
    assert summary.controls[-1][0] == 200
    np.testing.assert_allclose(summary.controls[-1][1], 0.5)  # type: ignore[arg-type]
    assert main(["log", str(path)]) == 0
    assert re.search("from token 200 +adaptive:0.5,window=64", capsys.readouterr().out)
    session.eval(ids(500, 2))
    assert LogSummary.of(path).header["policy"] == "adaptive:0.5,window=64"


def test_what_is_refused_empties_no_log(tiny: LLM, tmp_path: Path) -> None:
    path = tmp_path / "log"
    guarded(tiny, path).eval(ids(200))
    before = path.read_bytes()
    with pytest.raises(ArgumentError, match="5 layers"):
        guarded(tiny, path, start=Control.none(5))
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["log", "log.1"])
def test_other_files_are_not_overwritten(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).write_text('{"a thesis": 1}\n')
    log = ["--attention", "window:64", "--max-tokens", "1", "--log", str(tmp_path / "log")]
    assert main(["generate", "and", "-m", str(tiny_model), *log]) == 1
    expected = f"{tmp_path / name}: not a decision log, and not overwritten: choose another file for the log"
    assert capsys.readouterr().err == f"pyllm: error: {expected}\n"
    assert (tmp_path / name).read_text() == '{"a thesis": 1}\n'


# ---- a full disk ----


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """No file grows beyond this one's size and a part of a line."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("repair", [False, True])
def test_a_full_disk_leaves_nothing_that_was_not_audited(tiny: LLM, tmp_path: Path, repair: bool) -> None:
    path = tmp_path / "log"
    session = guarded(tiny, path, repair=repair, lost_limit=0.2)
    session.eval(ids(200))
    assert session.watch
    for _ in range(2):
        with full_disk(path), pytest.raises(FileError, match="log: the decision log could not be written"):
            session.eval(ids(200, 1))
        assert session.position == 200
        assert session.watch._timeline.audits[-1].position < 200
        assert not LogSummary.of(path).cut_off
        assert LogSummary.of(path).rewinds == 0
    logits = session.eval(ids(200, 1))
    whole = guarded(tiny, tmp_path / "whole", repair=repair, lost_limit=0.2)
    np.testing.assert_array_equal(logits, whole.eval([*ids(200), *ids(200, 1)]))
    logs = [LogSummary.of(path), LogSummary.of(tmp_path / "whole")]
    assert logs[0].n_tokens == logs[1].n_tokens
    assert [position for position, _, _ in logs[0].controls] == [p for p, _, _ in logs[1].controls]


def test_a_full_disk_keeps_nothing_that_was_rewound(tiny: LLM, tmp_path: Path) -> None:
    session = guarded(tiny, tmp_path / "log", repair=False)
    session.eval(ids(400))
    with full_disk(tmp_path / "log"), pytest.raises(FileError):
        session.rewind(250)
    assert session.watch
    assert session.position == 250
    assert session.watch._timeline.audits[-1].position < 250


def test_a_full_disk_when_a_new_file_begins(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = DecisionLog(path, {"n_layers": 1, "n_heads": 8}, limit=2**16, masses=False)
    while path.stat().st_size <= 2**15 - 15:
        log.rewind(1000)
    before = path.read_bytes()
    (tmp_path / "empty").touch()
    for _ in range(2):
        with full_disk(tmp_path / "empty"), pytest.raises(FileError):
            log.rewind(1000)
    log.rewind(1000)
    assert (tmp_path / "log.1").read_bytes() == before
    assert LogSummary.of(path).rewinds == 1


def test_a_last_line_that_is_cut_off_is_left_out(
    tiny: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = guarded(tiny, tmp_path / "log", repair=False)
    session.eval(ids(300))
    good = (tmp_path / "log").read_bytes()
    (tmp_path / "cut").write_bytes(good + b'{"tokens":300,"n":1,"loc')
    assert main(["log", str(tmp_path / "cut")]) == 0
    assert "the last line is cut off and left out" in capsys.readouterr().out
    assert LogSummary.of(tmp_path / "cut").n_tokens == LogSummary.of(tmp_path / "log").n_tokens
    assert main(["log", str(tmp_path / "log")]) == 0
    assert "cut off" not in capsys.readouterr().out


# ---- damaged logs ----

HEADER = '{"pyllm_log": 1, "n_layers": 1, "n_heads": 8}'
MISSED = '"missed": "00", "page_missed": "00"'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: no decision log"),
        ("{}\n", "line 1: no decision log"),
        ("hello\n", "line 1: not JSON"),
        ("[]\n", "line 1: expected a JSON object"),
        ('{"pyllm_log": 1, "n_layers": 0, "n_heads": 8}\n', "line 1: n_layers and n_heads"),
        (f"{HEADER}\n\xff\n", "line 2: not JSON"),
        (f"{HEADER}\n{'[' * 100_000}\n", "line 2: not JSON"),
        (f'{HEADER}\n{{"token": 1}}\n', "line 2: unknown entry 'token'"),
        (f"{HEADER}\n{{}}\n", "line 2: unknown entry ''"),
        (f'{HEADER}\n{{"rewind": -1}}\n', "line 2: rewind is -1"),
        (f'{HEADER}\n{{"rewind": 1}}\n{{"tokens": 0, "n": 1}}\n', "line 3: 'local' is missing"),
        (f'{HEADER}\n{{"tokens": 0, "n": 2, "local": ["ff"]}}\n', "line 2: decisions for other than 2"),
        (f'{HEADER}\n{{"tokens": 0, "n": 1, "local": ["ffff"]}}\n', "line 2: 2 bytes of decisions"),
        (f'{HEADER}\n{{"tokens": 0, "n": 1, "local": ["xy"]}}\n', "line 2: non-hex"),
        (
            f'{HEADER}\n{{"audit": 0, "missed": "00", "page_missed": "00", "lost": [[2]]}}\n',
            "line 2: numbers",
        ),
        (
            f'{HEADER}\n{{"audit": 0, "missed": "00", "page_missed": "00", "lost": [{[2] * 8}]}}\n',
            "line 2: lost shares outside",
        ),
        (f'{HEADER}\n{{"control": 0, "threshold": [0.1, 0.2], "page_share": null}}\n', "line 2: numbers"),
        (f'{HEADER}\n{{"repair": 5, "first": 1, "stop": 9, "lost": "x"}}\n', "line 2: lost is 'x'"),
        (f'{HEADER}\n{{"repair": 5, "first": 1, "stop": 9, "lost": "nan"}}\n', "line 2: lost is 'nan'"),
        (f'{HEADER}\n{{"repair": 5, "first": 1, "stop": 9, "lost": NaN}}\n', "line 2: not JSON"),
        (
            f'{HEADER}\n{{"control": 5, "threshold": null, "page_share": 1e999}}\n',
            "line 2: page_share is inf",
        ),
        ('{"pyllm_log": 1, "n_layers": 4096, "n_heads": 4096}\n', "line 1: n_layers and n_heads are"),
        (f'{HEADER[:-1]}, "guard": "abc"}}\n', "line 1: guard is 'abc'"),
        (f'{HEADER[:-1]}, "guard": [1, 2]}}\n', r"line 1: guard is \[1, 2\]"),
    ],
)
def test_a_damaged_log_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "bad.log"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(FormatError, match=message) as caught:
        LogSummary.of(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert main(["log", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert str(path) in err


def test_names_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = '"model": "[/x]", "fingerprint": "[red]", "policy": "[/]", "guard": {"[/y]": "[/z]"}'
    changed = '{"policy": 3, "name": "[/w]"}'
    (tmp_path / "log").write_text(f"{HEADER[:-1]}, {names}}}\n{changed}\n")
    assert main(["log", str(tmp_path / "log")]) == 0
    out = capsys.readouterr().out
    for text in ("[/x] ([red])", "[/]", "[/y] [/z]", "[/w]"):
        assert text in out


def test_other_versions_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "new").write_text('{"pyllm_log": 2}\n')
    with pytest.raises(UnsupportedError, match="version 2, this pyllm reads 1"):
        LogSummary.of(tmp_path / "new")
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(FileError, match="could not be read"):
            LogSummary.of(path)


def test_any_cut_or_flip_is_read_or_refused(tiny: LLM, tmp_path: Path, rng: np.random.Generator) -> None:
    session = guarded(tiny, tmp_path / "log")
    session.eval(ids(300))
    session.guard = None
    good = (tmp_path / "log").read_bytes()
    for _ in range(100):
        bad = bytearray(good[: rng.integers(len(good) // 2, len(good) + 1)])
        bad[rng.integers(len(bad))] = rng.integers(256)
        (tmp_path / "bad").write_bytes(bad)
        message = "line "
        try:
            LogSummary.of(tmp_path / "bad")
        except (FormatError, UnsupportedError) as error:
            message = str(error)
        assert "line " in message


# ---- the command ----


def test_the_command_sums_up(tiny: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = guarded(tiny, tmp_path / "log", lost_limit=0.2)
    session.eval(ids(700))
    assert main(["log", str(tmp_path / "log")]) == 0
    out = capsys.readouterr().out
    assert session.stats.guard
    for text in ("heads local", "miss rate", "lost share", "adaptive:array", "from token", "dense from"):
        assert text in out
    assert f"{session.stats.guard.repairs:,}" in out


def test_a_prompt_that_goes_on_is_no_rewind(tiny: LLM, tmp_path: Path) -> None:
    session = guarded(tiny, tmp_path / "log")
    session.sync(ids(200))
    session.sync([*ids(200), 1])
    assert LogSummary.of(tmp_path / "log").rewinds == 0
    session.sync([*ids(150), 2])
    assert LogSummary.of(tmp_path / "log").rewinds == 1


def test_a_log_of_nothing_is_fine(tiny: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guarded(tiny, tmp_path / "log")
    assert main(["log", str(tmp_path / "log")]) == 0
    assert "0, 0 with a bulk" in capsys.readouterr().out


def test_generate_with_a_guard_and_a_log(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    arguments = ["generate", "and the " * 100, "-m", str(tiny_model), "--attention", "adaptive:0,window=64"]
    options = ["--audit-rate", "0.1", "--log", str(log), "--hold-back", "--max-tokens", "20", "--seed", "1"]
    assert main([*arguments, *options]) == 0
    capsys.readouterr()
    assert LogSummary.of(log).tally.audits > 5
    assert main([*arguments, "--audit-rate", "7"]) == 1
    assert capsys.readouterr().err == "pyllm: error: audit_rate: expected a number from 1e-06 to 1, got 7.0\n"
