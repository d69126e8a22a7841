"""The share of the bulk that a policy reads and computes: measured by an evaluation, or assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from pyllm.errors import ArgumentError, FormatError
from pyllm.evaluate.results import Results, Row
from pyllm.files import file_sha256
from pyllm.profile import Profile, find
from pyllm.survey.model_file import ModelFile


@dataclass(frozen=True)
class Share:
    """read: of the bulk's bytes in decode, work: of the bulk's multiply-adds in prefill; 1 is dense
    attention's. kl: to dense attention in nats where it was measured. source: where the figures come from."""

    name: str
    read: float
    work: float
    source: str
    kl: float | None = None


# Whatever a policy does, it lies between these two.
BOUNDS = (Share("dense", 1, 1, "dense reads all of it", 0.0), Share("window", 0, 0, "a window nothing"))


def assumed(text: str) -> Share:
    """ "NAME=PERCENT": a policy that reads and computes that much of the bulk. Raises ArgumentError."""
    name, equals, percent = text.rpartition("=")
    try:
        value = float(percent)
    except ValueError:
        value = math.nan
    if not (name and equals and 0 <= value <= 200):
        raise ArgumentError(f"{text!r}: expected NAME=PERCENT, such as pages=20, of 0 to 200 % of the bulk")
    if name in {bound.name for bound in BOUNDS}:
        raise ArgumentError(
            f"{text!r}: what {name} reads and computes is known, and stands beside the others"
        )
    return Share(name, value / 100, value / 100, f"{name} assumed")


def measured(path: Path, model: ModelFile, window: int, sinks: int) -> list[Share]:
    """From the rows that `pyllm eval --json` kept, the mean over their texts.

    Raises FileError, FormatError for what is no such file, and ArgumentError where it is of another model,
    window or number of sinks.
    """
    results = Results.read(path)
    wanted = {"model sha256": [file_sha256(p) for p in model.paths], "window": window, "sinks": sinks}
    for name, value in wanted.items():
        found = results.settings.get(name)
        if found != value:
            raise ArgumentError(f"{path}: measured with {name} {found!r}, but here it is {value!r}")
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in results.rows:
        groups.setdefault((row.line, row.setting), []).append(row)
    if not groups:
        raise FormatError(f"{path}: an evaluation without any row")
    source = f"others measured on {results.settings.get('tokens')} tokens, {path.name}"
    return [share for group in groups.values() if (share := _of_rows(group, source))]


def presets(model: ModelFile, window: int, sinks: int) -> list[Share]:
    """Those of the model's profile, where it has one for this window and number of sinks.

    Raises FileError and FormatError for a profile that cannot be used.
    """
    path = find(model.paths, model.fingerprint)
    if path is None:
        return []
    found = []
    for name, preset in Profile.load(path, model.fingerprint).presets.items():
        if (preset.policy.window, preset.policy.sinks) == (window, sinks):
            of = preset.measured
            found.append(
                Share(name, of.bulk_read / 100, of.bulk_work / 100, f"presets by {path.name}", of.kl)
            )
    return found


def combined(others: Sequence[Share]) -> list[Share]:
    """The bounds, then the others; of equal names the last counts."""
    return list({share.name: share for share in (*BOUNDS, *others)}.values())


def _of_rows(rows: Sequence[Row], source: str) -> Share | None:
    """None where no query had a bulk."""
    work = [row.bulk_work for row in rows if row.bulk_work is not None]
    read = [row.decode_read for row in rows if row.decode_read is not None]
    if not work or not read:
        return None
    kl = fmean(row.kl for row in rows)
    return Share(rows[0].name, fmean(read) / 100, fmean(work) / 100, source, kl)
