"""Finished answers, and the file that keeps them: one line of JSON each, behind a line of settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllm.errors import FileError, FormatError
from pyllm.evaluate.fields import checked, each
from pyllm.evaluate.outputs import write
from pyllm.evaluate.results import require_same

FORMAT = "pyllm eval tasks 1"


@dataclass(frozen=True)
class Answer:
    """What the model said to a sample under a policy. tokens: of the prompt. expected, chance: the sample's.
    heads_local, bulk_work, bulk_read: as `LayerStats`, of prompt and answer."""

    task: str
    sample: int
    policy: str
    score: float
    text: str
    expected: list[str]
    chance: float
    tokens: int
    heads_local: float | None
    bulk_work: float | None
    bulk_read: float | None

    def __post_init__(self) -> None:
        if not 0 <= self.score <= 1:
            raise ValueError(f"score: expected 0 to 1, got {self.score}")

    @property
    def key(self) -> tuple[str, int, str]:
        return self.task, self.sample, self.policy


class Answers:
    """By task, sample and policy. settings: all that an answer depends on besides these. path: the file that
    each goes to as soon as it is there, if any."""

    def __init__(self, settings: dict[str, Any], path: Path | None = None) -> None:
        self.settings, self.path = settings, path
        self._found: dict[tuple[str, int, str], Answer] = {}

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any]) -> Answers:
        """What the file holds, or a new file. Of a run that was killed, an unfinished last line is dropped.

        Raises FileError, and FormatError for what is no such file or was made with other settings.
        """
        answers = cls(settings, path)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = b""
        except OSError as error:
            raise FileError(f"{path}: the answers cannot be read: {error.strerror or error}") from None
        whole = data[: data.rfind(b"\n") + 1]
        head = (json.dumps({"format": FORMAT, "settings": settings}) + "\n").encode()
        if whole:
            answers._read(path, whole)
        elif not head.startswith(data):
            raise FormatError(f"{path}: not the answers of an evaluation of tasks: name another file")
        if not whole or whole != data:
            write(path, whole or head)
        return answers

    def find(self, task: str, sample: int, policy: str) -> Answer | None:
        return self._found.get((task, sample, policy))

    def add(self, found: Iterable[Answer]) -> None:
        """Raises FileError."""
        new = list(found)
        self._found |= {answer.key: answer for answer in new}
        if self.path:
            lines = "".join(_line(answer) for answer in new)
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(lines)
            except OSError as error:
                raise FileError(f"{self.path}: cannot be written: {error.strerror or error}") from None

    def _read(self, path: Path, data: bytes) -> None:
        head, *lines = data[:-1].split(b"\n")
        try:
            found = json.loads(head)
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']!r}")
            settings = dict(found["settings"])
            read = each("answer", lambda line: checked(Answer, json.loads(line)), lines)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError(
                f"{path}: not the answers of an evaluation of tasks ({type(error).__name__}: {error})"
            ) from None
        require_same(path, settings, self.settings)
        self._found = {answer.key: answer for answer in read}


def _line(answer: Answer) -> str:
    return json.dumps(dataclasses.asdict(answer), ensure_ascii=False) + "\n"
