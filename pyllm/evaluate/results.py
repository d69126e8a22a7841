"""Finished rows, and the file that keeps them from run to run."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.errors import FileError, FormatError
from pyllm.evaluate import domains, fields
from pyllm.evaluate.classifier import Classifier
from pyllm.evaluate.metrics import BLOCK
from pyllm.evaluate.outputs import write

FORMAT = "pyllm eval 1"
FITTED = "fitted texts"  # the setting that tells their digests


@dataclass(frozen=True)
class Row:
    """A policy on a text. Percentages are 0..100; None where there was nothing to measure.

    tokens: those with a bulk, which quality is the mean of. kl: KL to dense attention in nats, with its 95 %
    interval. top1: % of tokens where dense attention's likeliest is also this one's. heads_local, bulk_work,
    bulk_read, pages_read: as `LayerStats`, of the prefill. prefill_seconds: of the whole text, with logits.
    decode_*: the text's last tokens, one by one; milliseconds are the median of a token. dense_*: the
    same of the dense session beside it.
    """

    text: str
    line: str
    setting: float | None
    tokens: int
    kl: float
    kl_low: float | None
    kl_high: float | None
    top1: float
    perplexity: float
    dense_perplexity: float
    heads_local: float | None
    bulk_work: float | None
    bulk_read: float | None
    prefill_seconds: float
    dense_prefill_seconds: float
    decode_tokens: int
    decode_kl: float | None
    decode_bulk_read: float | None
    decode_ms: float | None
    dense_decode_ms: float | None
    pages_read: float | None = None
    decode_kl_low: float | None = None
    decode_kl_high: float | None = None

    @property
    def key(self) -> tuple[str, str, float | None]:
        return self.text, self.line, self.setting

    @property
    def name(self) -> str:
        return self.line if self.setting is None else f"{self.line} {self.setting:g}"

    @property
    def tells_decode(self) -> bool:
        """Whether tokens enough were decoded to say something about its quality."""
        return self.decode_tokens >= BLOCK

    @property
    def decode_read(self) -> float | None:
        """% of the bulk's bytes that decode reads; where nothing was decoded, prefill, the only witness."""
        return self.bulk_read if self.decode_bulk_read is None else self.decode_bulk_read


@dataclass
class Results:
    """What the JSON file holds, beside what follows from it: per policy the text where it is worst.

    settings: all that a row depends on besides its policy: the model's sha256, the texts', sizes, seed.
    local_shares: (n_layers, n_heads) or None, what static labels were chosen by. classifiers: the records of
    the adaptive rule's estimates.
    """

    settings: dict[str, Any]
    local_shares: NDArray[np.float64] | None = None
    rows: list[Row] = field(default_factory=list)
    classifiers: list[Classifier] = field(default_factory=list)

    def find(self, text: str, line: str, setting: float | None) -> Row | None:
        return next((row for row in self.rows if row.key == (text, line, setting)), None)

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any]) -> Results:
        """What an earlier run left at path, or nothing yet where there is no file.

        Raises as `read` does, and FormatError for results of other settings.
        """
        if not os.path.lexists(path):
            return cls(settings)
        results = cls.read(path)
        # Rows that need no fit go with any: the first that does decides on which texts.
        known = {FITTED: {**settings, **results.settings}.get(FITTED)}
        require_same(path, {**known, **results.settings}, {**known, **settings})
        results.settings = {**settings, **results.settings}
        return results

    @classmethod
    def read(cls, path: Path) -> Results:
        """Raises FileError where path cannot be read, FormatError for what holds no results."""
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"{path}: the results cannot be read: {error}") from None
        try:
            found = json.loads(text)
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']!r}")
            rows = fields.each("row", partial(fields.checked, Row), found["rows"])
            classifiers = fields.each("classifier", Classifier.read, found.get("classifiers", []))
            return cls(_settings(found["settings"]), _local_shares(found["local_shares"]), rows, classifiers)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            cause = f"{type(error).__name__}: {error}"
            raise FormatError(f"{path}: not the results of an evaluation ({cause})") from None

    def save(self, path: Path) -> None:
        """Raises FileError."""
        content = {
            "format": FORMAT,
            "settings": self.settings,
            "local_shares": None if self.local_shares is None else self.local_shares.tolist(),
            "worst_text": {worst.policy: worst.text for worst in domains.worst(self.rows)},
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "classifiers": [dataclasses.asdict(record) for record in self.classifiers],
        }
        write(path, json.dumps(content, indent=1).encode() + b"\n")


def _settings(found: Any) -> dict[str, Any]:
    """Raises ValueError for what is none, and for a number that is shown as one and is not."""
    if not isinstance(found, dict) or not fields.is_of(float, found.get("rope base", 0)):
        raise ValueError("settings: expected an object whose rope base, if any, is a number")
    return found


def _local_shares(found: Any) -> NDArray[np.float64] | None:
    if found is None:
        return None
    shares = np.array(found, np.float64)
    if shares.ndim != 2 or not np.isfinite(shares).all():
        raise ValueError("local_shares: expected finite numbers by layer and head")
    return shares


def require_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise FormatError(
                f"{path}: these results were made with {name} {found.get(name)!r}, now it is "
                f"{wanted.get(name)!r}: name another file, or remove this one"
            )
