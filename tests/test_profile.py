"""Profiles: what is written is read back, what is broken or another model's is refused, and presets are
policies that LLM, sessions and commands take by name."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pyllm import (
    LLM,
    Adaptive,
    ArgumentError,
    Calibration,
    Dense,
    FileError,
    FormatError,
    Oracle,
    Static,
    Window,
)
from pyllm.attention import GRADED, PRESETS, UNCALIBRATED, Policy
from pyllm.calibration import MOMENTS
from pyllm.cli import main
from pyllm.evaluate.candidates import Choice, Fitted, candidates
from pyllm.profile import DECODE_PART, DESCRIPTION, VERSION, Measured, Preset, Profile, beside

SHAPE = (2, 8)  # of the tiny model
OTHER = "0123456789abcdef"  # the fingerprint of no model
MEASURED = Measured(3000, 0.004, 0.003, 0.005, 97.5, 20.0, 200, 0.002, 0.001, 0.006, 12.0)
CALIBRATION = Calibration(
    np.arange(48).reshape(*SHAPE, 3),
    np.ones((2, 2, 32)),
    np.tile(np.eye(32), (2, 2, 1, 1)),
    np.ones((2, 2, 32)),
    np.linspace(0, 1, 128).reshape(2, 2, 32),
    np.linspace(-1, 1, 128).reshape(2, 2, 32),
    (16, 600),
)
POLICIES = {
    "conservative": Dense(page_bits=4, page_share=0.002, decode_share=0.001),
    "balanced": Adaptive([0.95, 2.0], page_bits="graded", page_share=0.007, calibration=CALIBRATION),
    "aggressive": Window(window=512),
}


def profile_of(fingerprint: str, policies: dict[str, Policy] = POLICIES) -> Profile:
    own = replace(CALIBRATION, model=fingerprint)
    presets = {}
    for name, policy in policies.items():
        if isinstance(policy, Adaptive) and policy.calibration:
            policy = replace(policy, calibration=own)
        presets[name] = Preset(policy, 0.01, MEASURED)
    shares = np.linspace(0, 1, 16, dtype=np.float32).reshape(SHAPE)
    made = {"texts": {"a": "ff"}, "seed": 0}
    return Profile(fingerprint, "tiny", made, presets, shares, own)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model in a folder of its own, where a profile may lie beside it."""
    return Path(shutil.copy(tiny_model, tmp_path / "m.gguf"))


@pytest.fixture
def profile(model: Path) -> Profile:
    """Saved beside the model."""
    made = profile_of(LLM(model, attention=Dense()).fingerprint)
    made.save(beside([model]))
    return made


# ---- the file ----

pages: dict[str, Any] = {
    "page_bits": st.sampled_from([0, 2, 3, 4]),
    "page_share": st.floats(0, 1),
    "decode_share": st.none() | st.floats(0, 1),
    "page_drop": st.floats(0, 5),
    "page_rest": st.sampled_from([None, 0.0]),
    "window": st.integers(1, 2**31 - 1),
    "sinks": st.integers(0, 64),
}
thresholds = st.floats(0, 2) | hnp.arrays(
    np.float64, st.sampled_from([SHAPE, SHAPE[:1]]), elements=st.floats(0, 2)
)
policies = st.one_of(
    st.builds(Dense, **pages),
    st.builds(Window, window=pages["window"], sinks=pages["sinks"]),
    *(
        st.builds(kind, thresholds, st.sampled_from(["head", "group"]), **pages)
        for kind in (Oracle, Adaptive)
    ),
)
numbers = st.floats(0, 1e6)


def random_calibration(rng: np.random.Generator, moments: str) -> Calibration:
    roots = rng.normal(0, 100, (2, 2, 16, 16)).astype(np.float32)
    covariances = roots + roots.swapaxes(-1, -2)  # symmetric, which is all that a file relies on
    return Calibration(
        rng.normal(size=(*SHAPE, 3)),
        rng.normal(size=(2, 2, 16)),
        covariances,
        rng.random((2, 2, 16)),
        rng.random((2, 2, 16)),
        rng.normal(size=(2, 2, 16)),
        (4, 99),
        moments,
        OTHER,
    )


presets = st.builds(Preset, policies, numbers, st.builds(Measured, *[numbers] * 11))


@settings(deadline=None)
@given(
    presets=st.fixed_dictionaries(dict.fromkeys(PRESETS, presets)),
    seed=st.integers(0, 2**32 - 1),
    moments=st.sampled_from(MOMENTS),
    shares=hnp.arrays(np.float32, SHAPE, elements=st.floats(0, 1, width=32)),
    name=st.text(),
    made=st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.floats(allow_nan=False))),
)
def test_round_trip(
    presets: dict[str, Preset],
    seed: int,
    moments: str,
    shares: np.ndarray,
    name: str,
    made: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("profiles") / "p"
    calibration = random_calibration(np.random.default_rng(seed), moments)
    fitted = Adaptive(0.8, estimate="maximum", moments=moments, calibration=calibration)
    presets = {**presets, "balanced": replace(presets["balanced"], policy=fitted)}
    saved = Profile(OTHER, name, made, presets, shares, calibration)
    saved.save(path)
    loaded = Profile.load(path, OTHER)
    assert (loaded.fingerprint, loaded.model, loaded.made) == (saved.fingerprint, name, made)
    assert loaded.presets == presets
    assert loaded.calibration == calibration
    np.testing.assert_array_equal(loaded.local_shares, shares)
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first


def test_loss_and_cost() -> None:
    assert MEASURED.loss == MEASURED.decode_kl_high / DECODE_PART > MEASURED.kl_high
    assert replace(MEASURED, kl_high=1.0).loss == 1.0
    assert MEASURED.cost == 16


def test_another_models_is_refused(profile: Profile, model: Path) -> None:
    with pytest.raises(
        FormatError, match=rf"m\.profile: .*another model, tiny \({profile.fingerprint}, not 00"
    ):
        Profile.load(beside([model]), "00")


def edited(path: Path, edit: Callable[[dict[str, Any]], object], drop: str = "") -> None:
    """Rewrites the description of a profile, and leaves a member out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name != drop}
    description = json.loads(members[DESCRIPTION])
    edit(description)
    members[DESCRIPTION] = json.dumps(description).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def at(path: str, value: Any) -> Callable[[dict[str, Any]], object]:
    """Sets the value behind a path of keys; None takes it away."""

    def edit(found: dict[str, Any]) -> None:
        *folders, last = path.split("/")
        for folder in folders:
            found = found[folder]
        found.pop(last) if value is None else found.__setitem__(last, value)

    return edit


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "other format": (at("format", "zip"), "not of the format"),
    "version": (at("version", 1), f"a profile of version 1, but this pyllm reads {VERSION}: make it again"),
    "no version": (at("version", None), "version None"),
    "no presets": (at("presets", None), "presets"),
    "a list of presets": (at("presets", [1]), "not a profile"),
    "a preset less": (at("presets/balanced", None), "no preset balanced"),
    "no such policy": (at("presets/balanced/policy/name", "static"), "static"),
    "a policy's field": (at("presets/balanced/policy/windw", 3), "windw"),
    "another profile": (at("presets/balanced/policy/profile", "m.profile"), "adaptive has no profile"),
    "its range": (at("presets/balanced/policy/page_bits", 7), "page_bits: expected"),
    "its shape": (at("presets/balanced/policy/threshold", [0.5] * 3), r"shape \(3,\)"),
    "a measure less": (at("presets/balanced/measured/kl", None), "'kl'"),
    "not a number": (at("presets/balanced/measured/kl", float("nan")), "kl: expected a number, got nan"),
    "no end": (at("positions", [float("inf"), 1]), "not a profile"),
    "no number": (at("presets/balanced/measured/kl", "x"), "kl: expected a number, got 'x'"),
    "no budget": (at("presets/balanced/budget", [1]), "budget: expected a number"),
    "no positions": (at("positions", None), "positions"),
    "no range": (at("positions", [7, 7]), "no range"),
    "no moments": (at("moments", "x"), "moments"),
    "made of nothing": (at("made", 3), "not a profile"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_contents_that_contradict_themselves(profile: Profile, model: Path, edit: str) -> None:
    change, message = EDITS[edit]
    edited(beside([model]), change)
    with pytest.raises(FormatError, match=rf"m\.profile: .*{message}"):
        Profile.load(beside([model]))


def test_members_that_are_missing_or_wrong(profile: Profile, model: Path, tmp_path: Path) -> None:
    path = beside([model])
    edited(path, lambda found: None, drop="local_shares.npy")
    with pytest.raises(FormatError, match="local_shares"):
        Profile.load(path)
    wrong = [np.zeros(3, np.float32), np.zeros(SHAPE, int), np.full(SHAPE, np.nan), np.array([[None]])]
    for shares in wrong:
        data = io.BytesIO()
        np.save(data, shares, allow_pickle=True)
        profile.save(path)
        edited(path, lambda found: None, drop="local_shares.npy")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("local_shares.npy", data.getvalue())
        with pytest.raises(FormatError, match=r"m\.profile"):
            Profile.load(path)


def test_damaged_files(profile: Profile, model: Path, rng: np.random.Generator) -> None:
    """Every truncation and every changed byte is found, or changes nothing that is read."""
    path = beside([model])
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        description = json.loads(archive.read(DESCRIPTION))
    for size in (0, 1, 30, len(good) // 2, *rng.integers(0, len(good) - 1, 20)):
        path.write_bytes(good[:size])
        with pytest.raises(FormatError, match=r"m\.profile: not a profile, or a damaged one: "):
            Profile.load(path)
    for place in rng.integers(0, len(good), 200):
        broken = bytearray(good)
        broken[place] ^= int(rng.integers(1, 256))
        path.write_bytes(broken)
        with contextlib.suppress(FormatError, FileError):
            loaded = Profile.load(path)
            assert loaded.presets == profile.presets
            assert loaded.made == description["made"]
            np.testing.assert_array_equal(loaded.local_shares, profile.local_shares)


def test_files_that_cannot_be_read_or_written(profile: Profile, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileError, match=f"{path.name}: the profile cannot be read"):
            Profile.load(path)
    with pytest.raises(FileError, match="cannot be written"):
        profile.save(tmp_path / "nowhere" / "p")


# ---- presets ----


def test_presets_are_policies_by_name(profile: Profile, model: Path) -> None:
    for name in POLICIES:
        assert LLM(model, attention=name).attention == profile.presets[name].policy
    llm = LLM(model)
    assert llm.attention == profile.presets["balanced"].policy
    session = llm.session(attention="aggressive")
    assert session.attention == POLICIES["aggressive"]
    session.attention = "conservative"
    assert session.attention == POLICIES["conservative"]


def test_a_profile_can_be_named(profile: Profile, model: Path, tmp_path: Path) -> None:
    beside([model]).rename(tmp_path / "of, mine")
    llm = LLM(model, attention=f"balanced:{tmp_path / 'of, mine'}")
    assert llm.attention == profile.presets["balanced"].policy
    assert llm.profile is None
    with pytest.raises(FileError, match="nothing"):
        llm.session(attention=f"balanced:{tmp_path / 'nothing'}")


def test_estimates_take_the_profiles_calibration(profile: Profile, model: Path) -> None:
    llm = LLM(model, attention="adaptive:0.8,estimate=maximum")
    assert llm.attention == Adaptive(0.8, estimate="maximum", calibration=profile.calibration)
    session = llm.session(attention="adaptive,moments=calibrated")
    assert session.attention == Adaptive(moments="calibrated", calibration=profile.calibration)
    beside([model]).unlink()
    with pytest.raises(ArgumentError, match="needs a calibration for this model, and there is none"):
        LLM(model, attention="adaptive:0.8,estimate=maximum")


def test_a_policy_takes_the_calibration_of_a_profile(profile: Profile, model: Path, tmp_path: Path) -> None:
    llm, path = LLM(model), beside([model])
    expected = Adaptive(0.8, estimate="maximum", calibration=profile.calibration)
    for source in (profile, path, str(path)):
        policy = Adaptive(0.8, estimate="maximum", profile=source)
        assert policy == llm.session(attention=policy).attention == expected
        assert replace(policy, threshold=0.7) == replace(expected, threshold=0.7)
    with pytest.raises(ArgumentError, match="a calibration and a profile"):
        Adaptive(calibration=CALIBRATION, profile=path)
    with pytest.raises(FileError, match="nowhere: the profile cannot be read"):
        Adaptive(estimate="maximum", profile=tmp_path / "nowhere")
    kv = np.zeros((3, 2, 32))
    larger = Calibration(np.zeros((3, 8, 3)), kv, np.zeros((3, 2, 32, 32)), kv, kv, kv, (0, 1))
    other = replace(profile, calibration=larger, local_shares=np.zeros((3, 8), np.float32))
    with pytest.raises(ArgumentError, match="but the model has"):
        llm.session(attention=Adaptive(estimate="maximum", profile=other))
    other_file = tmp_path / "other"
    profile_of(OTHER).save(other_file)
    refused = Adaptive(estimate="maximum", profile=other_file), Dense(page_bits=GRADED, profile=other_file)
    for of_other in refused:
        with pytest.raises(ArgumentError, match=f"of another model \\({OTHER}, not {llm.fingerprint}"):
            llm.session(attention=of_other)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_static_labels_by_the_profiles_shares(profile: Profile, model: Path, share: float) -> None:
    """As the rows of an evaluation: the heads of a key/value head together."""
    llm = LLM(model)
    policy = llm.policy(f" static:{share},page_bits=3,window=512 ")
    fitted = Fitted(2, profile.local_shares.astype(np.float64))
    (_, row) = candidates(Choice(512, policies=["static"], shares=[share]), fitted)
    assert row.line == "static group"
    assert isinstance(row.policy, Static)
    assert policy == replace(row.policy, page_bits=3)
    assert llm.session(attention=policy).attention == policy
    with pytest.raises(ArgumentError, match=r"'static:1\.5': expected a share of heads from 0 to 1"):
        llm.policy("static:1.5")
    beside([model]).unlink()
    with pytest.raises(ArgumentError, match=r"'static:0\.3': needs a profile of this model"):
        LLM(model, attention="static:0.3")


def test_without_a_profile(model: Path) -> None:
    llm = LLM(model)
    assert llm.attention == UNCALIBRATED
    with pytest.raises(ArgumentError, match=r"'balanced': .*m\.gguf has no profile; pyllm calibrate .*makes"):
        llm.session(attention="balanced")


def test_another_models_profile_is_never_used(model: Path) -> None:
    profile_of("00").save(beside([model]))
    for attention in (None, "balanced"):
        with pytest.raises(FormatError, match="another model"):
            LLM(model, attention=attention)
    assert LLM(model, attention="dense").attention == Dense()


def test_commands_take_presets(profile: Profile, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, policy in POLICIES.items():
        assert main(["info", "-m", str(model), "--attention", name]) == 0
        shown = capsys.readouterr().out.replace("\n", "")
        assert str(policy) in shown
        assert "m.profile" in shown
    assert main(["generate", "-m", str(model), "--attention", "balanced", "--max-tokens", "3", "the"]) == 0
    capsys.readouterr()
    beside([model]).write_bytes(b"PK")
    assert main(["info", "-m", str(model)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "m.profile: not a profile, or a damaged one: File is not a zip file" in error
    beside([model]).unlink()
    for attention, message in (
        ("balanced", "has no profile"),
        ("adaptive,estimate=regression", "there is none"),
        ("adaptive,estimate=x", "expected one of"),
    ):
        assert main(["info", "-m", str(model), "--attention", attention]) == 1
        assert message in capsys.readouterr().err


# ---- presets beside other rows of an evaluation ----


def test_presets_are_evaluated_under_names_of_their_own(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a later calibration replaced is not taken for what it put there."""
    prose, rows = tmp_path / "prose.txt", tmp_path / "rows.json"
    prose.write_text("the inner hand " * 300)
    command = ["eval", str(model), "--text", str(prose), "--ctx", "400", "--window", "64", "--decode", "0"]
    command += ["--json", str(rows), "--attention", "balanced", "adaptive:0.8,window=64"]

    def lines() -> list[str]:
        return [row["line"] for row in json.loads(rows.read_text())["rows"]]

    fingerprint = LLM(model, attention=Dense()).fingerprint
    for page_share in (0.01, 0.02, 0.02):
        policy = Adaptive([0.95, 2.0], window=64, page_bits=3, page_share=page_share)
        profile_of(fingerprint, {**POLICIES, "balanced": policy}).save(beside([model]))
        assert main(command) == 0
    first, second = (line for line in lines() if line.startswith("balanced "))
    assert first != second
    assert sorted(lines()) == sorted([first, second, "dense", "adaptive:0.8,window=64"])
    assert second in capsys.readouterr().out


def test_a_profile_with_a_name_that_is_markup_or_no_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "[").mkdir()
    monkeypatch.chdir(tmp_path)  # tables show the whole path, and would break a long one anywhere
    path = Path(os.fsdecode(b"[/d]$^$\xff.profile"))
    policy = Adaptive([0.95, 2.0], window=64, page_bits=3)
    fingerprint = LLM(model, attention=Dense()).fingerprint
    profile_of(fingerprint, {**POLICIES, "balanced": policy}).save(path)
    prose, outputs = tmp_path / "prose.txt", [tmp_path / "rows.csv", tmp_path / "plot.png"]
    prose.write_text("the inner hand " * 300)
    common = ["eval", str(model), "--csv", str(outputs[0]), "--attention", f"balanced:{path}"]
    on_text = ["--text", str(prose), "--ctx", "400", "--window", "64", "--plot", str(outputs[1])]
    for arguments in (on_text, ["--tasks", "qa", "--length", "1800", "--samples", "1"]):
        assert main([*common, *arguments]) == 0
        assert "[/d]$^$\ufffd.profile" in capsys.readouterr().out.replace("\n", "")
        assert "[/d]$^$\ufffd.profile" in outputs[0].read_text("utf-8")


def test_a_preset_of_another_window_is_no_row(
    profile: Profile, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prose = tmp_path / "prose.txt"
    prose.write_text("the inner hand " * 300)
    command = ["eval", str(model), "--text", str(prose), "--ctx", "400", "--window", "64", "--attention"]
    assert main([*command, "balanced"]) == 1
    assert "--attention balanced" in (shown := capsys.readouterr().err)
    assert "window 1024, but --window is 64" in shown
