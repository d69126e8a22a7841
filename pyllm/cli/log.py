"""`pyllm log`: what a decision log says."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from pyllm.cli.terminal import percent, render
from pyllm.guard.log_summary import LogSummary

HELP = "Sum up a decision log that --log wrote."

COURSE = 12  # lines of what has a course: thresholds, policies, repairs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="the log; FILE.1 is what was written before it")


def run(args: argparse.Namespace) -> int:
    summary = LogSummary.of(args.file)
    for table in (overview(summary), layers(summary), course(summary), repairs(summary)):
        if table.row_count:
            print(render(table))
    return 0


def overview(summary: LogSummary) -> Table:
    """What and how much."""
    header, tally = summary.header, summary.tally
    pairs = summary.n_bulk * summary.local.size
    table = Table(show_header=False, box=None)
    for name, value in (
        ("model", f"{header.get('model')} ({header.get('fingerprint')})"),
        ("policy", f"{header.get('policy')}"),
        *((f"from token {position:,}", name) for position, name in summary.policies[-COURSE:]),
        ("guard", ", ".join(f"{k} {v}" for k, v in dict(header.get("guard") or {}).items())),
        ("tokens", f"{summary.n_tokens:,}, {summary.n_bulk:,} with a bulk; {summary.rewinds:,} rewinds"),
        ("heads local", percent(100 * int(summary.local.sum()) / pairs if pairs else None)),
        ("bulk read", f"{decimal(summary.n_read)} of {decimal(summary.n_bytes)}"),
        ("audits", f"{tally.audits:,}"),
        ("miss rate", share(tally.miss_rate)),
        ("page miss rate", share(tally.page_miss_rate)),
        ("lost share", f"mean {share(tally.lost_share)}"),
        ("repairs", f"{len(summary.repairs):,}"),
    ):
        table.add_row(name, Text(value))  # a name is no markup
    if summary.cut_off:
        table.add_row("remark", "the last line is cut off and left out: its writer was stopped")
    return table


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def layers(summary: LogSummary) -> Table:
    """Per layer. The 99 % is that of the layer's worst head."""
    table = Table("layer", "heads local", "miss rate", "lost share", "99 %", "threshold", box=None)
    tally, n_heads = summary.tally, summary.local.shape[1]
    rates, means, quantiles = tally.miss_rates()[0], tally.lost_means()[0], tally.lost_quantiles()[0]
    last = next((t for _, t, _ in reversed(summary.controls) if t is not None), None)
    for i in range(len(summary.local)):
        local = 100 * summary.local[i].sum() / (summary.n_bulk * n_heads) if summary.n_bulk else None
        audited = (
            [share(float(x)) for x in (rates[i].mean(), means[i].mean(), quantiles[i].max())]
            if tally.audits
            else ["–"] * 3
        )
        tau = "–" if last is None else f"{np.median(last[i]):.3f}"
        table.add_row(str(i), percent(local), *audited, tau)
    return table


def course(summary: LogSummary) -> Table:
    """How thresholds went over the layers: least, median, greatest; at most COURSE lines."""
    table = Table("from token", "threshold", "median", "to", "page share", box=None)
    controls = summary.controls
    chosen = np.unique(np.linspace(0, len(controls) - 1, COURSE).round().astype(int))
    for at in chosen[: len(controls)]:
        position, thresholds, page = controls[at]
        shown = ["–"] * 3
        if thresholds is not None:
            shown = [f"{f(thresholds):.3f}" for f in (np.min, np.median, np.max)]
        table.add_row(f"{position:,}", *shown, "–" if page is None else f"{page:.5f}")
    return table


def repairs(summary: LogSummary) -> Table:
    table = Table("repair at", "dense from", "to", "lost share", box=None)
    for cause, first, stop, lost in summary.repairs[-COURSE:]:
        table.add_row(f"{cause:,}", f"{first:,}", f"{stop:,}", share(lost))
    return table
