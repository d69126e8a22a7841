"""What people see and type: progress bars, the status line, tables, and the line editor of the REPL."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Tick = Callable[[int, int], None]
ShowProgress = Callable[[], AbstractContextManager[Tick]]


class _Speed(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} {self.unit}/s" if task.speed else "")


@contextmanager
def prefill_bar(what: str = "reading", unit: str = "tokens") -> Iterator[Tick]:
    """A bar on standard error with tokens, tokens/s and time left; nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn(what),
        BarColumn(),
        TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}"),
        _Speed(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=1, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def status_line(answer: Mapping[str, Any], n_ctx: int) -> str:
    """One line on a completion (or its last chunk): tokens, speeds, context used, what attention read."""
    usage, timings, attention = answer["usage"], answer["timings"], answer["attention"]
    reused = f" ({timings['cache_n']:,} kept)" if timings["cache_n"] else ""
    parts = [
        f"prompt {usage['prompt_tokens']:,} tokens{reused}{_speed(timings['prompt_per_second'])}",
        f"answer {usage['completion_tokens']:,} tokens{_speed(timings['predicted_per_second'])}",
        f"context {usage['total_tokens']:,}/{n_ctx:,}",
        f"heads local {percent(attention['heads_local'])}",
        f"bulk read {percent(attention['bulk_read'])}",
    ]
    if attention.get("guard", {}).get("repairs"):
        parts.append(f"{attention['guard']['repairs']:,} repairs")
    reason = answer["choices"][0]["finish_reason"]
    ending = {"length": ["cut at max tokens"], "context": ["cut: the context is full"]}.get(reason, [])
    return f"[{' · '.join(parts + ending)}]"


def guard_line(found: Mapping[str, Any]) -> str:
    """One line on what audits found, by `Tally.summary`."""
    shares = (("missed", "miss_rate"), ("missed pages", "page_miss_rate"), ("lost", "lost_share"))
    parts = [f"{name} {100 * found[key]:.2f} %" for name, key in shares if found[key] is not None]
    return ", ".join([f"{found['audits']:,} audits", *parts, f"{found['repairs']:,} repairs"])


def _speed(per_second: float | None) -> str:
    return f" at {per_second:,.0f} t/s" if per_second else ""


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f} %"


def render(table: Table, width: int = 100) -> str:
    """A table as plain text, of at most that many characters in a line."""
    text = io.StringIO()
    Console(file=text, width=width, force_terminal=False, color_system=None).print(table)
    return text.getvalue()


def line_reader(prompt: str) -> Callable[[], str]:
    """Reads a line from the user; raises EOFError at the end and KeyboardInterrupt for Ctrl-C.

    At a terminal with editing and a history kept between runs; otherwise plain lines, without a prompt.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class KeptHistory(FileHistory):
        def store_string(self, string: str) -> None:
            # A full disk must not end the conversation.
            with contextlib.suppress(OSError):
                super().store_string(string)

    path = history_path()
    editor: PromptSession[str] = PromptSession(history=KeptHistory(path) if path else InMemoryHistory())
    return lambda: editor.prompt(prompt)


def history_path() -> Path | None:
    """The history file in the user's cache directory, or None where it cannot be written."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        path = cache / "pyllm" / "history"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            return path
    except (OSError, RuntimeError):
        return None
