"""A finished survey for people: tables on the terminal."""

from __future__ import annotations

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from pyllm import bulk
from pyllm.files import shown
from pyllm.survey.result import Survey

UNREADABLE_SHOWN = 20

LEGEND = (
    "KV read: bytes of the KV cache read for a token after a document, mean over the documents; % of dense "
    "attention's. with weights: the same with the weights, which every token reads too. prefill work: "
    "multiply-adds of attention, % of dense attention's."
)
PROJECTED = (
    "These follow from the lengths and each policy's share of the bulk; nothing was timed (--measure does)."
)
TIMED = "Times are projected from dense attention's measured speed, without what a policy's decisions cost."


def headline(survey: Survey) -> str:
    n, unreadable = len(survey.tokens), len(survey.folder.unreadable)
    rest = f"; {unreadable} could not be read" if unreadable else ""
    return (
        f"{shown(survey.folder.root)}: {n:,} documents, {survey.tokens.sum():,} tokens "
        f"({survey.model.name}){rest}"
    )


def lengths(survey: Survey) -> Table:
    """Percentiles, and how many documents are longer than the window and the context."""
    table = _table("tokens of a document", "")
    names = {0: "shortest", 50: "median", 100: "longest"}
    for p, value in survey.percentiles.items():
        table.add_row(names.get(p, f"{p} % have at most"), f"{value:,.0f}")
    bulk_from = bulk.bulk_from(survey.window, survey.sinks)
    for label, flags in (
        (f"beyond the window (a bulk from {bulk_from:,} tokens on)", survey.beyond_window),
        (f"beyond the context ({survey.n_ctx:,} tokens)", survey.beyond_context),
    ):
        table.add_row(label, f"{flags.sum():,} ({100 * flags.mean():.0f} %)")
    return table


def policies(survey: Survey) -> Table:
    timed = survey.speed is not None
    columns = ["KL", "KV read", "%", "with weights %", "prefill work %"]
    table = _table("policy", *columns, *(["decode ms", "prefill s"] if timed else []))
    for one in survey.projections:
        cells = ["–" if one.share.kl is None else f"{one.share.kl:.4f}", decimal(round(one.kv_bytes))]
        cells += [f"{one.kv_percent:.1f}", f"{one.decode_percent:.1f}", f"{one.work_percent:.1f}"]
        if timed:
            cells += [f"{one.decode_ms:.1f}", f"{one.prefill_seconds:.1f}"]
        table.add_row(Text(one.share.name), *cells)
    return table


def sources(survey: Survey) -> str:
    """Where the shares of the bulk come from."""
    found = dict.fromkeys(one.share.source for one in survey.projections)
    return f"Shares of the bulk: {'; '.join(found)}."


def unreadable(survey: Survey) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("could not be read", overflow="fold")
    table.add_column("", overflow="fold")
    listed = survey.folder.unreadable[:UNREADABLE_SHOWN]
    for one in listed:
        table.add_row(Text(shown(one.path)), Text(one.cause))
    if more := len(survey.folder.unreadable) - len(listed):
        table.add_row(f"and {more:,} more", "(--csv lists all)")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
