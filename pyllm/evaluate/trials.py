"""What a calibration has measured, kept until it is finished: an interrupted one goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pyllm.attention import Policy
from pyllm.evaluate.asked import digest
from pyllm.evaluate.fields import checked
from pyllm.evaluate.outputs import write
from pyllm.evaluate.tradeoff import MOST_AT_ONCE
from pyllm.llm import LLM
from pyllm.profile import Measured


class Trials:
    """settings: all that a measurement depends on besides its policy, as JSON holds it. path: of the file, if
    any; one of other settings, or a damaged one, is of no use and is replaced."""

    def __init__(self, llm: LLM, settings: dict[str, Any], path: Path | None = None) -> None:
        self.llm, self.settings, self.path = llm, settings, path
        self._found = _read(path, settings) if path else {}

    def measured(
        self, kind: str, policies: Sequence[Policy], measure: Callable[[Sequence[Policy]], Sequence[Measured]]
    ) -> list[Measured]:
        """Of each policy what is known, or what measure finds, kept after every few. kind: tells measurements
        of the same policy apart. Raises FileError."""
        keys = [f"{kind} {digest(self.llm, policy)}" for policy in policies]
        new = [pair for pair in zip(keys, policies, strict=True) if pair[0] not in self._found]
        for first in range(0, len(new), MOST_AT_ONCE):
            names, group = zip(*new[first : first + MOST_AT_ONCE], strict=True)
            self._found |= zip(names, measure(group), strict=True)
            self._keep()
        return [self._found[key] for key in keys]

    def _keep(self) -> None:
        if self.path:
            trials = {key: asdict(measured) for key, measured in self._found.items()}
            write(self.path, json.dumps({"settings": self.settings, "trials": trials}, indent=1).encode())


def _read(path: Path, settings: dict[str, Any]) -> dict[str, Measured]:
    try:
        found = json.loads(path.read_bytes())
        if found["settings"] == settings:
            return {key: checked(Measured, values) for key, values in found["trials"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return {}
