"""Results of several models side by side: whether a policy's loss and cost carry over to other positional
encodings and other domains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from pyllm.errors import ArgumentError
from pyllm.evaluate.results import Results, Row
from pyllm.llm import LLM

UNKNOWN = "unknown"  # in files of before it was kept
Files = Sequence[tuple[Path, Results]]


def rope(llm: LLM) -> dict[str, Any]:
    """The model's positional encoding as its file says it, for the settings of results."""
    prefix = f"{llm.info.architecture}.rope"
    kind = llm.metadata.get(f"{prefix}.scaling.type", "none")
    if kind != "none":
        scaling = f"{kind} {llm.metadata.get(f'{prefix}.scaling.factor', 1.0):g}"
    else:
        scaled = any(tensor.name == "rope_freqs.weight" for tensor in llm.tensors())
        scaling = "by frequency" if scaled else "none"
    return {"rope base": llm.metadata.get(f"{prefix}.freq_base", 10000.0), "rope scaling": scaling}


def headlines(files: Files) -> Iterator[str]:
    """A line per file, under the letter that the table calls it."""
    for letter, (path, results) in zip(_letters(files), files, strict=True):
        known = {name: results.settings.get(name, UNKNOWN) for name in (
            "model", "rope base", "rope scaling", "tokens", "window"
        )}  # fmt: skip
        base = known["rope base"]
        yield (
            f"{letter}: {known['model']}, RoPE base {base if base == UNKNOWN else f'{base:,.0f}'}, scaling "
            f"{known['rope scaling']}, {known['tokens']} tokens, window {known['window']} ({path})"
        )


def table(files: Files) -> Table:
    """Per text and policy that any file has: KL, heads local, bulk bytes read in each.

    Raises ArgumentError where no policy on no text is in two of the files.
    """
    rows = [{(row.text, row.name): row for row in results.rows} for _, results in files]
    keys = dict.fromkeys(key for found in rows for key in found)
    if not any(sum(key in found for found in rows) > 1 for key in keys):
        raise ArgumentError("--compare: the files have no policy on no text in common")
    shown = Table(box=None, padding=(0, 1, 0, 0))
    shown.add_column("text", no_wrap=True)
    shown.add_column("policy", no_wrap=True)
    for letter in _letters(files):
        for name in ("KL", "local", "read"):
            shown.add_column(f"{name} {letter}", justify="right", no_wrap=True)
    texts = list(dict.fromkeys(text for text, _ in keys))
    for text, policy in sorted(keys, key=lambda key: texts.index(key[0])):
        cells = (cell for found in rows for cell in _cells(found.get((text, policy))))
        shown.add_row(*map(Text, (text, policy, *cells)))
    return shown


def _letters(files: Files) -> Sequence[str]:
    return [chr(ord("A") + i) for i in range(len(files))]


def _cells(row: Row | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    costs = ("–" if value is None else f"{value:.1f}" for value in (row.heads_local, row.bulk_read))
    return [f"{row.kl:.4f}", *costs]
