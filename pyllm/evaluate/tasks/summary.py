"""Answers as a table: per task and policy the score, beside dense attention's, and the cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from rich.text import Text

from pyllm.attention import Dense
from pyllm.evaluate.intervals import difference_interval, mean_interval
from pyllm.evaluate.tasks.answers import Answer

DENSE = str(Dense())

LEGEND = (
    "In %: score with its 95 % interval (Wilson); points to dense attention on the same samples with their "
    "95 % interval (Newcombe's for tasks with one answer, for the others Bonett and Price's); chance: "
    "what naming things of the right kind blindly scores; heads local; bulk work; bulk bytes read."
)


@dataclass(frozen=True)
class TaskRow:
    """A policy on a task. All numbers but samples, tokens are percentages; difference: points to dense, on
    paired of the samples; None where there is nothing to say."""

    task: str
    policy: str
    samples: int
    tokens: float
    score: float
    low: float
    high: float
    paired: int
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    chance: float
    heads_local: float | None
    bulk_work: float | None
    bulk_read: float | None


def rows(answers: Sequence[Answer]) -> list[TaskRow]:
    """Per task and policy, in the order of the answers; then per policy over all tasks, where there are
    several: of an evaluation that was interrupted, of whatever samples it came to."""
    tasks = list(dict.fromkeys(answer.task for answer in answers))
    found = [row for task in tasks for row in _rows(task, [a for a in answers if a.task == task])]
    return found + (_rows("all", answers) if len(tasks) > 1 else [])


def above_chance(found: Iterable[TaskRow]) -> list[str]:
    """Tasks whose interval under dense attention lies above chance."""
    return [row.task for row in found if row.policy == DENSE and row.task != "all" and row.low > row.chance]


def table(found: Iterable[TaskRow]) -> Table:
    columns = ("n", "score", "95 %", "chance", "to dense", "95 %", "local", "work", "read")
    shown = Table(box=None, padding=(0, 1, 0, 0))
    shown.add_column("task", no_wrap=True)
    shown.add_column("policy", overflow="fold")
    for name in columns:
        shown.add_column(name, justify="right", no_wrap=True)
    before = None
    for row in found:
        shown.add_row(*map(Text, ("" if row.task == before else row.task, row.policy, *_cells(row))))
        before = row.task
    return shown


def _rows(task: str, answers: Sequence[Answer]) -> list[TaskRow]:
    dense = {(a.task, a.sample): a.score for a in answers if a.policy == DENSE}
    policies = dict.fromkeys(answer.policy for answer in answers)
    return [_row(task, name, [a for a in answers if a.policy == name], dense) for name in policies]


def _row(task: str, policy: str, answers: Sequence[Answer], dense: dict[tuple[str, int], float]) -> TaskRow:
    scores = np.array([answer.score for answer in answers])
    low, high = mean_interval(scores)
    pairs = [(a.score, dense[a.task, a.sample]) for a in answers if (a.task, a.sample) in dense]
    difference = interval = None
    if pairs and policy != DENSE:
        own, others = np.array(pairs).T
        difference = 100 * float((own - others).mean())
        fractions = any(len(answer.expected) > 1 for answer in answers)
        interval = difference_interval(own, others, fractions=fractions)
    return TaskRow(
        task=task,
        policy=policy,
        samples=len(answers),
        tokens=float(np.mean([answer.tokens for answer in answers])),
        score=100 * float(scores.mean()),
        low=100 * low,
        high=100 * high,
        paired=len(pairs),
        difference=difference,
        difference_low=100 * interval[0] if interval else None,
        difference_high=100 * interval[1] if interval else None,
        chance=100 * float(np.mean([answer.chance for answer in answers])),
        heads_local=_mean(answer.heads_local for answer in answers),
        bulk_work=_mean(answer.bulk_work for answer in answers),
        bulk_read=_mean(answer.bulk_read for answer in answers),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _cells(row: TaskRow) -> list[str]:
    return [
        str(row.samples),
        f"{row.score:.1f}",
        _interval(row.low, row.high),
        f"{row.chance:.0f}",
        "" if row.difference is None else f"{row.difference:+.1f}",
        _interval(row.difference_low, row.difference_high, "+.1f"),
        *(
            "–" if value is None else f"{value:.1f}"
            for value in (row.heads_local, row.bulk_work, row.bulk_read)
        ),
    ]


def _interval(low: float | None, high: float | None, form: str = ".1f") -> str:
    return "" if low is None or high is None else f"{low:{form}}…{high:{form}}"
