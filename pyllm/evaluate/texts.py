"""The texts that are evaluated: prose and code that every Python carries, or the user's own."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import abc, import_module, util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyllm import documents
from pyllm.errors import ArgumentError
from pyllm.files import shown
from pyllm.llm import LLM

# A token is rarely longer on average, so that this many characters per token are enough to cut from.
CHARACTERS_PER_TOKEN = 16

# Fitting (static labels) and evaluating use different modules, and different halves of the reference.
EVALUATED_MODULES = ("argparse", "difflib", "mailbox", "statistics", "tarfile")
FITTED_MODULES = ("configparser", "doctest", "optparse", "pickle", "smtplib")


@dataclass(frozen=True)
class Text:
    """tokens: (n,) int32, with BOS where the model asks for it."""

    name: str
    tokens: NDArray[np.int32]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest()


def builtin(*, fitted: bool = False) -> dict[str, str]:
    """Half of Python's language reference as "prose", some modules of its library as "code".

    fitted: the other half and other modules, for what is fitted before it is evaluated.
    """
    modules = FITTED_MODULES if fitted else EVALUATED_MODULES
    return {"prose": _reference(1 if fitted else 0), "code": "\n\n".join(map(_source, modules))}


def files(paths: Sequence[str]) -> dict[str, str]:
    """The documents at paths, by file name as any output can show it. Raises DocumentError, and ArgumentError
    for equal names."""
    found = {shown(Path(path).name): documents.read(path) for path in paths}
    if len(found) < len(paths):
        raise ArgumentError("--text: two files have the same name, which is what tells them apart in results")
    return found


def excerpt(llm: LLM, name: str, text: str, n_tokens: int, seed: int) -> Text:
    """At most n_tokens of a text, from the beginning of a line that seed chooses."""
    room = CHARACTERS_PER_TOKEN * n_tokens
    start = random.Random(seed).randrange(max(1, len(text) - room))
    start = text.rfind("\n", 0, start) + 1
    ids = [*bos(llm), *llm.tokenize(text[start : start + room], parse_special=False)]
    return Text(name, np.array(ids[:n_tokens], np.int32))


def bos(llm: LLM) -> list[int]:
    """What a text of this model begins with: its BOS token, or nothing."""
    tokenizer = llm.tokenizer
    return [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []


def _reference(half: int) -> str:
    """Topics repeat parts of others: the second half goes without the paragraphs of the first, and has each
    of its own once, because parts of it are fitted, searched and reported on."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    first, second = ("\n\n".join(topics[name] for name in sorted(topics)[at::2]) for at in (0, 1))
    if half == 0:
        return first
    known = set(_paragraphs(first))
    return "\n\n".join(
        paragraph for paragraph in dict.fromkeys(_paragraphs(second)) if paragraph not in known
    )


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text)


def _source(module: str) -> str:
    spec = util.find_spec(module)
    loader = spec.loader if spec else None
    source = loader.get_source(module) if isinstance(loader, abc.InspectLoader) else None
    if not source:
        raise ArgumentError(f"this Python carries no source of its module {module}: name files with --text")
    return source
