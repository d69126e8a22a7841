"""The tasks by name. A new one is one more entry in its file's TASKS."""

from __future__ import annotations

from collections.abc import Iterable

from pyllm.errors import ArgumentError
from pyllm.evaluate.tasks import counting, needles, questions, variables
from pyllm.evaluate.tasks.draft import Task

TASKS = {t.name: t for t in (*needles.TASKS, *variables.TASKS, *counting.TASKS, *questions.TASKS)}


def chosen(names: Iterable[str]) -> list[Task]:
    """Each once; "all" is all of them. Raises ArgumentError for a name that is none, and for no name."""
    found = dict.fromkeys(task for name in names for task in (TASKS if name == "all" else (name,)))
    for name in found:
        if name not in TASKS:
            raise ArgumentError(f"task {name!r} is unknown; there are {', '.join(TASKS)}, or all")
    if not found:
        raise ArgumentError(f"no task was given; there are {', '.join(TASKS)}, or all")
    return [TASKS[name] for name in found]
