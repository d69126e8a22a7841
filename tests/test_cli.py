"""The command line: what goes to which stream, exit statuses, and errors in one line."""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyllm import LLM
from pyllm.cli import build_parser, main
from pyllm.cli.terminal import history_path
from tiny_models import write_tiny

PROMPT = "the hand and the inner thing"


def spawn(*arguments: str | Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "pyllm", *map(str, arguments)]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_generate(tiny: LLM, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = tiny.generate(PROMPT, max_tokens=12, temperature=0)["choices"][0]["text"]
    arguments = ["--model", str(tiny_model), "--max-tokens", "12", "--temperature", "0"]
    assert main(["generate", PROMPT, *arguments]) == 0
    shown = capsys.readouterr()
    assert shown.out == expected + "\n"
    assert shown.err.startswith("[prompt ")


def test_generate_from_standard_input(
    tiny: LLM, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert main(["generate", "-", "-m", str(tiny_model), "--max-tokens", "5", "--seed", "3"]) == 0
    expected = tiny.generate(PROMPT, max_tokens=5, seed=3)["choices"][0]["text"]
    assert capsys.readouterr().out == expected + "\n"


def test_ask_about_a_document(
    tiny: LLM, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("the other hand\n" * 50)
    arguments = ["chat", "-m", str(tiny_model), "--max-tokens", "9", "--attention", "window:64"]
    assert main([*arguments, "--doc", str(tmp_path / "notes.txt"), "--ask", "what?"]) == 0
    shown = capsys.readouterr()
    content = "the other hand\n" * 50 + "\n\nQuestion: what?"
    n_prompt = len(tiny.chat_tokens([{"role": "user", "content": content}]))
    assert len(shown.out) > 1
    assert "[" not in shown.out.splitlines()[-1] or not shown.out.startswith("[prompt")
    assert f"[prompt {n_prompt} tokens at" in shown.err
    assert "heads local 100 % · bulk read 0 %" in shown.err
    # The likeliest answer, which is the default here, is the same every time.
    main([*arguments, "--doc", str(tmp_path / "notes.txt"), "--ask", "what?"])
    assert capsys.readouterr().out == shown.out


def test_chat_over_pipes_is_plain(tiny_model: Path) -> None:
    child = spawn("chat", "-m", tiny_model, "--max-tokens", "5")
    out, err = child.communicate("what?\n/exit\n")
    assert child.returncode == 0
    assert err == ""
    assert "\x1b" not in out
    assert out.count("[prompt") == 1


def test_chat_over_pipes_tells_who_runs_it_of_errors(tiny_model: Path) -> None:
    """Nobody reads along: answers go one way, errors another, and the status says that there were some."""
    child = spawn("chat", "-m", tiny_model, "--max-tokens", "5")
    out, err = child.communicate("/doc nosuch.txt\nwhat?\n")
    assert child.returncode == 1
    assert err.startswith("error: nosuch.txt: ")
    assert err.count("\n") == 1
    assert out.count("[prompt") == 1


def test_a_document_of_no_name_is_refused(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a variable leaves it that is not set."""
    assert main(["chat", "-m", str(tiny_model), "--doc", "", "--ask", "what?"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("pyllm: error: ")


def test_info(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", str(tiny_model), "--tensors", "--ctx", "1000"]) == 0
    shown = capsys.readouterr().out
    for line in ("8 query, 2 key/value, of 32", "llama", "4,096 tokens", "for a context of 1,000 tokens"):
        assert line in shown
    assert any(line.split() == ["blk.1.attn_k.weight", "F32", "256", "x", "64", "65.5", "kB"]
               for line in shown.splitlines())  # fmt: skip


def test_info_takes_names_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[v2]").mkdir()
    write_tiny(tmp_path / "[v2]" / "m.gguf", tokenizer=True)
    assert main(["info", "--model", "[v2]/m.gguf"]) == 0
    assert "[v2]/m.gguf" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["info", "--model", "nosuch"], 1, "nosuch"),
        (["generate", ""], 1, "empty"),
        (["generate", "x", "--device", "cuda:999"], 1, "CUDA"),
        (["generate", "x", "--ctx", "99999"], 1, "4096"),
        (["generate", "x", "--top-p", "2"], 1, "top_p"),
        (["chat", "--ask", " "], 1, "empty"),
        (["chat", "--doc", "nosuch.txt", "--ask", "x"], 1, "nosuch.txt"),
        (["chat", "--ctx", "3", "--ask", "x"], 1, "context holds 3"),
        (["pull", "nosuch"], 1, "nosuch"),
        (["chat", "--attention", "sideways"], 2, "sideways"),
        (["generate"], 2, "prompt"),
        (["dance"], 2, "dance"),
        ([], 2, "COMMAND"),
    ],
)
def test_errors_are_one_line(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, text: str
) -> None:
    if arguments[:1] in (["generate"], ["chat"]):
        arguments = [*arguments, "--model", str(tiny_model)]
    try:
        found = main(arguments)
    except SystemExit as exit_:  # argparse leaves so
        found = int(exit_.code or 0)
    shown = capsys.readouterr()
    assert found == status
    assert shown.out == ""
    assert shown.err.startswith("pyllm: error: ")
    assert shown.err.count("\n") == 1
    assert text in shown.err


def test_a_closed_pipe_is_no_traceback(tiny_model: Path) -> None:
    child = spawn("generate", PROMPT, "-m", tiny_model, "--max-tokens", "2000", "--top-k", "2")
    assert child.stdout
    assert child.stderr
    child.stdout.read(1)
    child.stdout.close()
    err = child.stderr.read()
    assert child.wait() == 1
    assert err == ""


def test_a_full_disk_is_one_line(tiny_model: Path) -> None:
    for command in (("generate", PROMPT), ("info",)):
        arguments = [sys.executable, "-m", "pyllm", *command, "-m", str(tiny_model)]
        with open("/dev/full", "w") as full:
            found = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (found.returncode, found.stderr.count("\n")) == (1, 1), found.stderr
        assert found.stderr == "pyllm: error: standard input or output: No space left on device\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_stream_is_an_empty_one(tiny_model: Path, closed: str) -> None:
    command = f'"{sys.executable}" -m pyllm chat -m "{tiny_model}" --max-tokens 3 {closed}'
    found = subprocess.run(["sh", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert found.returncode == 0
    assert found.stderr == ""


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
def test_no_encoding_is_a_traceback(tiny_model: Path, encoding: str) -> None:
    """Questions that are not the terminal's encoding, and answers that it does not have."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "pyllm", "chat", "-m", str(tiny_model), "--max-tokens", "5"]
    found = subprocess.run(command, input=b"\xff\xc3 what?\n\xe9\n", env=environment, capture_output=True)
    assert (found.returncode, found.stderr) == (0, b"")
    assert found.stdout.count(b"[prompt") == 2


def test_standard_input_that_is_no_text(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "pyllm", "generate", "-", "-m", str(tiny_model)]
    found = subprocess.run(command, input=b"the hand\0", capture_output=True)
    assert found.returncode == 1
    assert found.stderr == (
        b"pyllm: error: standard input: a binary file, not text (zero byte at offset 8)\n"
    )


def test_ctrl_c_is_one_line(default_model: Path) -> None:
    story = "Write a long story about a ship and its crew."
    child = spawn("generate", story, "-m", default_model, "--max-tokens", "2000", "--temperature", "0")
    assert child.stdout
    child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()
    assert child.returncode == 130
    assert err == "pyllm: interrupted\n"


def test_every_option_has_help() -> None:
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        for action in command._actions:
            assert action.help, f"{name} {action.option_strings}"
        command.format_help()


def test_history_survives_an_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "pyllm" / "history"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert history_path() is None
