"""The result of a benchmark as tables: reads what the JSON holds, so an old one can be shown again."""

from __future__ import annotations

from typing import Any

from rich.filesize import decimal
from rich.table import Table

from pyllm.benchmark.ceilings import Ceilings
from pyllm.benchmark.stages import Stage

Record = dict[str, Any]


def speed_table(result: Record) -> Table:
    """Tokens per second of every work and subject."""
    table = Table(
        "work", title="tokens per second: median (lowest to highest)", title_justify="left", box=None
    )
    for subject in result["subjects"]:
        table.add_column(subject, justify="right")
    for work, records in by_work(result).items():
        table.add_row(work, *(_spread(r["tokens_per_second"]) for r in records.values()))
    return table


def ratio_table(result: Record) -> Table:
    """Times as fast as the peer, which is taken at its best."""
    table = Table("work", "peer's best", title="times as fast as llama.cpp", title_justify="left", box=None)
    own = [subject for subject in result["subjects"] if subject not in result["peers"]]
    for subject in own:
        table.add_column(subject, justify="right")
    for ratio in result["ratios"]:
        table.add_row(ratio["work"], ratio["peer"], *(f"{ratio['times'][subject]:.2f}" for subject in own))
    return table


def opening_table(result: Record) -> Table:
    """Time to open and memory."""
    table = Table("", "open, seconds", "memory added", "peak", title_justify="left", box=None)
    for name, opening in result["opening"].items():
        memory = opening["memory"]
        seconds = _spread(opening["open_seconds"])
        table.add_row(name, seconds, decimal(memory["added"]), decimal(memory["peak"]))
    return table


def attention_table(result: Record) -> Table:
    """What each policy read, where a query had a bulk."""
    shares = ("heads local", "bulk work", "bulk read", "pages read")
    table = Table("work", "subject", *shares, title="attention, %", title_justify="left", box=None)
    for work, records in by_work(result).items():
        for subject, entry in records.items():
            values = [entry["attention"].get(name.replace(" ", "_")) for name in shares]
            if any(value is not None for value in values):
                table.add_row(work, subject, *("–" if value is None else f"{value:.1f}" for value in values))
    return table


def stage_table(record: Record, work: str, ceilings: Ceilings | None) -> Table:
    """Where the time of a measurement goes, how much of it the machine's ceilings explain."""
    title = f"{work}, {record['subject']}"
    table = Table("stage", title=title, title_justify="left", box=None)
    for column in ("ms", "share", "GB/s", "G mul-adds/s", *(["of ceiling"] if ceilings else [])):
        table.add_column(column, justify="right")
    stages = [Stage(**stage) for stage in record["stages"]]
    total = sum(stage.seconds for stage in stages)
    for stage in stages:
        row = [
            f"{1e3 * stage.seconds:.2f}",
            f"{100 * stage.seconds / total:.1f} %" if total else "–",
            _rate(stage.bytes, stage.seconds),
            _rate(stage.multiply_adds, stage.seconds),
        ]
        if ceilings:
            floor = ceilings.floor(stage)
            row.append(f"{100 * floor / stage.seconds:.1f} %" if floor and stage.seconds else "–")
        table.add_row(stage.name, *row)
    runs = record["seconds"]["runs"]
    rest = sum(runs) / len(runs) - total
    table.add_row("outside the stages", f"{1e3 * rest:.2f}")
    return table


def by_work(result: Record) -> dict[str, dict[str, Record]]:
    """The measurements by work and subject."""
    found: dict[str, dict[str, Record]] = {}
    for record in result["measurements"]:
        found.setdefault(record["work"], {})[record["subject"]] = record
    return found


def largest(result: Record) -> list[int]:
    """Which works, by index, are the longest prefill and the deepest decode."""
    kinds = [next(iter(records.values()))["kind"] for records in by_work(result).values()]
    return sorted({kind: i for i, kind in enumerate(kinds)}.values())


def ratios(result: Record) -> list[Record]:
    """Of each work: the peer that is fastest by its median, and how many times as fast each subject is."""
    found = []
    for work, records in by_work(result).items():
        speed = {subject: record["tokens_per_second"]["median"] for subject, record in records.items()}
        best = max(result["peers"], key=lambda peer: speed[peer])
        times = {subject: speed[subject] / speed[best] for subject in speed if subject not in result["peers"]}
        found.append({"work": work, "peer": best, "times": times})
    return found


def _spread(values: Record) -> str:
    median, low, high = (_short(values[name]) for name in ("median", "min", "max"))
    return f"{median} ({low}–{high})"


def _short(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds / 1e9:.1f}" if count and seconds else "–"
