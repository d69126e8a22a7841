"""Results for people: tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from pyllm.evaluate.classifier import Classifier, Quality
from pyllm.evaluate.results import Row

DEFAULT_THRESHOLD = 0.9
COLUMNS = 4  # of a table by layers, so that it fits a terminal

LEGEND = (
    "KL to dense attention in nats with its 95 % interval; ppl: perplexity. In %: top-1, tokens whose "
    "likeliest next token is dense attention's; heads local; bulk work; bulk bytes read; time beside dense's."
)
CLASSIFIER_LEGEND = (
    "Estimates against the truth, head by head on dense attention's queries. Recall: of the heads that are "
    "long by the oracle at the same threshold, those called long, in %; precision: of those called long, "
    "those that are; error: of the bulk's estimated mass in nats, its mean and quantiles. Per layer: recall, "
    "precision, mean error."
)


def by_text(rows: Iterable[Row]) -> list[tuple[str, list[Table]]]:
    """Per text a line on it and on dense attention, and tables of the policies: of prefill, and of decode
    where that had tokens enough to say something about its quality."""
    found = []
    for _, group in itertools.groupby(rows, lambda row: row.text):
        rows_of_text = list(group)
        decoded = [row for row in rows_of_text if row.tells_decode]
        tables = [_table(rows_of_text), *([_decode_table(decoded)] if decoded else [])]
        found.append((_headline(rows_of_text[0]), tables))
    return found


def classifier_tables(records: Iterable[Classifier]) -> list[tuple[str, list[Table]]]:
    """Per text a table of all layers together, and tables of every layer at the threshold nearest to 0.9."""
    found = []
    for text, group in itertools.groupby(records, lambda record: record.text):
        of_text = list(group)
        threshold = min((record.threshold for record in of_text), key=lambda t: abs(t - DEFAULT_THRESHOLD))
        shown = [record for record in of_text if record.threshold == threshold]
        columns = [shown[i : i + COLUMNS] for i in range(0, len(shown), COLUMNS)]
        tables = [_quality_table(of_text), *map(_layer_table, columns)]
        found.append((f"{text}: long heads found", tables))
    return found


def _quality_table(records: Iterable[Classifier]) -> Table:
    columns = ("recall", "precision", "error", "5 %", "95 %")
    cells = ([f"{r.line} {r.threshold:g}", *_quality(r.total)] for r in records)
    return _columns("estimate", columns, cells)


def _layer_table(records: Sequence[Classifier]) -> Table:
    """Recall, precision and mean error, one estimate beside the other."""
    names = [record.line for record in records]
    rows = zip(*(record.layers for record in records), strict=True)
    cells = ([str(i), *(" ".join(_quality(q)[:3]) for q in row)] for i, row in enumerate(rows))
    return _columns(f"layer, at {records[0].threshold:g}", names, cells)


def _quality(quality: Quality) -> list[str]:
    errors = (quality.error, quality.error_low, quality.error_high)
    return [_percent(quality.recall), _percent(quality.precision), *(f"{error:+.2f}" for error in errors)]


def _headline(row: Row) -> str:
    decode = "" if row.dense_decode_ms is None else f", decode {row.dense_decode_ms:.1f} ms a token"
    return (
        f"{row.text}: {row.tokens:,} tokens with a bulk; dense attention: perplexity "
        f"{row.dense_perplexity:.2f}, prefill {row.dense_prefill_seconds:.1f} s{decode}"
    )


def _table(rows: Iterable[Row]) -> Table:
    columns = ("KL", "95 %", "ppl", "top-1", "local", "work", "read", "prefill", "decode")
    return _columns("policy", columns, map(_cells, rows))


def _decode_table(rows: Iterable[Row]) -> Table:
    cells = ([row.name, _kl(row.decode_kl), _percent(row.decode_bulk_read)] for row in rows)
    return _columns("in decode", ("KL", "read"), cells)


def _columns(first: str, others: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    found = Table(box=None, padding=(0, 1, 0, 0))
    found.add_column(first, no_wrap=True)
    for name in others:
        found.add_column(name, justify="right", no_wrap=True)
    for cells in rows:
        found.add_row(*map(Text, cells))
    return found


def _cells(row: Row) -> list[str]:
    interval = "–" if row.kl_low is None else f"{row.kl_low:.4f}–{row.kl_high:.4f}"
    costs = (_percent(value) for value in (row.heads_local, row.bulk_work, row.bulk_read))
    return [
        row.name,
        _kl(row.kl),
        interval,
        f"{row.perplexity:.2f}",
        f"{row.top1:.1f}",
        *costs,
        _ratio(row.prefill_seconds, row.dense_prefill_seconds),
        _ratio(row.decode_ms, row.dense_decode_ms),
    ]


def _kl(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _ratio(value: float | None, dense: float | None) -> str:
    return "–" if value is None or not dense else f"{100 * value / dense:.0f}"
