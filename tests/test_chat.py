"""The REPL: whole conversations through its callables, and one through a pseudo-terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pexpect
import pytest

from pyllm import LLM, Adaptive, ContextError, TemplateError
from pyllm.cli.chat import Repl
from pyllm.cli.conversation import Conversation, Document
from pyllm.cli.terminal import Tick

TEXT = "the inner hand and the other thing, " * 40
DOCUMENT = Document("notes.txt", TEXT)
Line = str | type[BaseException]


class Player:
    """A user at the REPL: types lines (or Ctrl-C, as KeyboardInterrupt), and keeps what was shown."""

    def __init__(self, llm: LLM, document: Document | None = None, **sampling: Any) -> None:
        self.conversation = Conversation(llm, {"temperature": 0.0, "max_tokens": 8, **sampling})
        self.conversation.open(document)
        self.output: list[str] = []
        self.progress: list[tuple[int, int]] = []
        self.on_write: Callable[[str], None] = lambda text: None
        self.on_tick: Tick = lambda done, total: None

    def play(self, *lines: Line) -> str:
        """What appears when these lines are typed and then Ctrl-D."""
        self.output.clear()
        typed = iter(lines)

        def read() -> str:
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        Repl(self.conversation, read, self._write, self._show_progress, self._write).run()
        return "".join(self.output)

    def _write(self, text: str) -> None:
        self.output.append(text)
        self.on_write(text)

    @contextmanager
    def _show_progress(self) -> Iterator[Tick]:
        yield self._tick

    def _tick(self, done: int, total: int) -> None:
        self.progress.append((done, total))
        self.on_tick(done, total)

    @property
    def evaluated(self) -> int:
        """Tokens evaluated so far, in prompts."""
        return self.conversation.session.stats.prefill_tokens


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_answer_and_its_status_line(tiny: LLM) -> None:
    player = Player(tiny)
    shown = player.play("what?")
    expected = tiny.chat([{"role": "user", "content": "what?"}], temperature=0, max_tokens=8)
    assert expected["choices"][0]["message"]["content"] + "\n[prompt " in shown
    usage = expected["usage"]
    status = shown.splitlines()[-1]
    assert f"[prompt {usage['prompt_tokens']} tokens" in status
    assert "answer 8 tokens at" in status
    assert f"context {usage['total_tokens']}/4,096" in status
    assert "heads local –" in status
    assert "bulk read –" in status
    assert "cut at max tokens" in status


def test_the_document_is_read_once(tiny: LLM) -> None:
    player = Player(tiny, DOCUMENT)
    n_document = len(tiny.tokenize(TEXT))
    shown = player.play()
    assert "notes.txt" in shown
    assert player.progress[-1][0] == player.progress[-1][1] == player.conversation.session.position
    assert n_document <= player.evaluated < n_document + 40
    for question in ("first?", "second?", "/reset", "third?"):
        before = player.evaluated
        shown = player.play(question)
        assert "error" not in shown
        # A question, its frame in the template and at most the last answer, but nothing of the document.
        assert player.evaluated - before < 60
    assert [message["content"] for message in player.conversation.messages][::2] == ["third?"]


def test_follow_up_questions_see_the_conversation(tiny: LLM) -> None:
    player = Player(tiny)
    player.play("one", "two")
    roles = [message["role"] for message in player.conversation.messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    messages = player.conversation.messages[:3]
    expected = tiny.chat(messages, temperature=0, max_tokens=8)["choices"][0]["message"]["content"]
    assert player.conversation.messages[3]["content"] == expected


# ---- Ctrl-C ----


def test_ctrl_c_while_the_document_is_read(tiny_model: Path) -> None:
    player = Player(LLM(tiny_model, n_batch=64), DOCUMENT)

    def stop_at_the_third_batch(done: int, total: int) -> None:
        if done == 192:
            player.on_tick = lambda done, total: None
            raise KeyboardInterrupt

    player.on_tick = stop_at_the_third_batch
    shown = player.play("what?")
    assert "[stopped]" in shown
    assert "192 tokens of notes.txt read" in shown
    assert "(192 kept)" in shown
    usage = (player.conversation.answer or {})["usage"]
    assert player.evaluated == usage["prompt_tokens"]


def test_ctrl_c_while_answering_keeps_what_was_said(tiny: LLM) -> None:
    player = Player(tiny, max_tokens=30)
    whole = tiny.chat([{"role": "user", "content": "what?"}], temperature=0, max_tokens=30)
    text = whole["choices"][0]["message"]["content"]

    def stop_after_some(_: str) -> None:
        said = "".join(player.output).partition("commands.\n")[2]
        if len(said) > 10:
            player.on_write = lambda text: None
            raise KeyboardInterrupt

    player.on_write = stop_after_some
    shown = player.play("what?", "and then?")
    kept = player.conversation.messages[1]["content"]
    assert text.startswith(kept)
    assert 10 < len(kept) < len(text)
    assert "[stopped]" in shown
    assert shown.count("[prompt") == 1
    assert [message["role"] for message in player.conversation.messages] == ["user", "assistant"] * 2


def test_ctrl_c_before_the_answer_forgets_the_question(tiny: LLM) -> None:
    player = Player(tiny)
    player.on_tick = interrupt
    assert "[stopped]" in player.play("what?")
    assert player.conversation.messages == []


def test_ctrl_c_at_the_prompt_does_not_leave(tiny: LLM) -> None:
    shown = Player(tiny).play(KeyboardInterrupt, "what?")
    assert "Ctrl-D leaves" in shown
    assert "[prompt" in shown


# ---- commands ----


def test_help_names_every_command(tiny: LLM) -> None:
    shown = Player(tiny).play("/help")
    listed = re.findall(r"^(/\w+) ", shown, re.MULTILINE)
    assert listed == ["/help", "/doc", "/reset", "/stats", "/attention", "/exit"]


def test_exit_leaves(tiny: LLM) -> None:
    assert "[prompt" not in Player(tiny).play("/exit", "never asked")


def test_errors_lead_back_to_the_prompt(tiny: LLM) -> None:
    player = Player(tiny, DOCUMENT)
    for line, message in {
        "/nosuch": "unknown command /nosuch",
        "/doc nosuch.txt": "nosuch.txt",
        "/attention sideways": "'sideways': expected dense",
        "/attention adaptive,sinks=3": "opened with 16",
    }.items():
        shown = player.play(line, "what?")
        assert re.search(f"^error: .*{re.escape(message)}", shown, re.MULTILINE)
        assert "[prompt" in shown
    assert player.conversation.document == DOCUMENT


def test_doc_shows_changes_and_drops_the_document(
    tiny: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a b.txt").write_text("the other text\n" * 30)
    player = Player(tiny, DOCUMENT)
    assert f"notes.txt, {len(TEXT):,} characters" in player.play("/doc")
    shown = player.play("one", f"/doc {tmp_path / 'a b.txt'}", "/doc")
    assert "a b.txt, 450 characters" in shown
    assert player.conversation.messages == []
    assert player.play("/doc none", "/doc").count("no document\n") == 2
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "a b.txt, 450 characters" in player.play("/doc ~/a b.txt", "/doc")


def test_a_document_that_does_not_fit_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(TEXT)
    player = Player(LLM(tiny_model, n_ctx=300))
    shown = player.play("one", f"/doc {tmp_path / 'long.txt'}", "/doc")
    assert re.search(r"error: .* tokens, but the context holds 300; .* needs", shown)
    assert "no document" in shown
    assert len(player.conversation.messages) == 2
    with pytest.raises(ContextError):
        Player(LLM(tiny_model, n_ctx=300), DOCUMENT)


def test_a_full_context_is_said_and_reset_helps(tiny_model: Path) -> None:
    player = Player(LLM(tiny_model, n_ctx=120))
    shown = player.play(*["what is the other thing?"] * 3)
    assert "the context holds 120" in shown or "the context is full" in shown
    assert "error" not in player.play("/reset", "what?")


def test_attention_applies_from_now_on(tiny_model: Path) -> None:
    llm = LLM(tiny_model, attention=Adaptive(window=64))
    player = Player(llm, DOCUMENT)
    shown = player.play("one", "/attention", "/attention dense,window=64", "two", "/stats")
    assert "\nadaptive:0.9,window=64\n" in shown
    assert re.search(r"heads local 0 % · bulk read 100 %.*\]$", shown, re.MULTILINE)
    assert re.search(r"^[\d,]+ tokens under adaptive:0\.9,window=64$", shown, re.MULTILINE)
    assert re.search(r"^\d+ tokens under dense,window=64$", shown, re.MULTILINE)
    table = [line.split() for line in shown.splitlines() if re.match(r" (\d|all) ", line)]
    assert [row[0] for row in table] == ["0", "1", "all"]


def test_a_model_without_a_template_cannot_chat(tiny: LLM) -> None:
    del tiny.metadata["tokenizer.chat_template"]
    with pytest.raises(TemplateError, match="generate"):
        Player(tiny)


# ---- a terminal ----


def expect_prompt(child: Any) -> None:
    child.expect_exact("\x1b[?2004h")  # the editor switches bracketed paste on,
    child.expect(r">.*\x1b\[\?25h")  # draws its prompt and shows the cursor


@pytest.mark.slow
def test_a_conversation_at_a_terminal(default_model: Path, tmp_path: Path) -> None:
    """Ctrl-C stops the reading, then an answer; a second answer reuses what was read; Ctrl-D leaves.

    Waits end as soon as they can: the timeout is for machines that read the manual in minutes.
    """
    manual = Path(__file__).parents[1] / "pyllm" / "data" / "manual.md"
    environment = {
        **os.environ,
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "XDG_CACHE_HOME": str(tmp_path),
        "TERM": "xterm",
    }
    arguments = ["-m", "pyllm", "chat", "--model", str(default_model), "--doc", str(manual), "--batch", "256"]
    child = pexpect.spawn(
        sys.executable, arguments, env=environment, encoding="utf-8", timeout=600, dimensions=(40, 160)
    )
    child.expect(r"Reading manual\.md")
    child.expect(r"[1-9][\d,]*/[\d,]+ tokens")  # the bar
    child.expect(r"tokens/s")
    child.sendintr()
    child.expect(r"([\d,]+) tokens of manual\.md read")
    stopped_at = int(child.match[1].replace(",", ""))
    assert 0 < stopped_at < 5000
    child.expect(r"\[stopped\]")
    expect_prompt(child)
    child.sendline("Write a long story about the keepers of the engine.")
    child.expect_exact("\x1b[?2004l")  # the editor has taken the line
    child.expect("([A-Za-z]+ ){5}")
    child.sendintr()
    child.expect(r"\[stopped\]")
    expect_prompt(child)
    child.sendline("Who built the engine?")
    child.expect(r"\[prompt ([\d,]+) tokens \(([\d,]+) kept\) at .* heads local \d+ % · bulk read \d+ %")
    assert int(child.match[2].replace(",", "")) > 5000
    expect_prompt(child)
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "Who built the engine?" in (tmp_path / "pyllm" / "history").read_text()
