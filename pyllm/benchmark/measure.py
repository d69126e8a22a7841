"""Runs a plan on everything that is to be compared, taking turns, and gathers what comes out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from pyllm.benchmark.engine import Engine, Sample
from pyllm.benchmark.plan import Plan
from pyllm.benchmark.stages import mean
from pyllm.guard import Guard

# Between two measurements: the threads of the one before go to sleep.
PAUSE_SECONDS = 0.02

# (what is measured, how many measurements are done, of how many)
Progress = Callable[[str, int, int], None]


class Subject(Protocol):
    """What can be measured: pyllm under a policy, or the peer."""

    @property
    def name(self) -> str: ...

    def prefill(self, n: int) -> Sample: ...

    def decode(self, depth: int, n: int) -> Sample: ...


class Opens(Protocol):
    """What holds a model."""

    def memory(self) -> dict[str, int]: ...

    def open(self) -> float: ...


@dataclass
class PolicySubject:
    """policy: its name in the engine."""

    engine: Engine
    policy: str

    @property
    def name(self) -> str:
        return f"pyllm {self.policy}"

    def prefill(self, n: int) -> Sample:
        return self.engine.prefill(self.engine.policies[self.policy], n)

    def decode(self, depth: int, n: int) -> Sample:
        return self.engine.decode(self.engine.policies[self.policy], depth, n)


class GuardedSubject(PolicySubject):
    """In decode under a guard with its default audits and control. It repairs nothing: on random tokens,
    which are no text, that would measure the repairs.
    """

    @property
    def name(self) -> str:
        return f"{super().name} guarded"

    def decode(self, depth: int, n: int) -> Sample:
        return self.engine.decode(self.engine.policies[self.policy], depth, n, Guard(repair=False))


@dataclass(frozen=True)
class Work:
    """`tokens` evaluated behind `depth` others: kind "prefill" at once, "decode" one by one."""

    kind: str
    depth: int
    tokens: int

    def __str__(self) -> str:
        return f"prefill {self.tokens:,}" if self.kind == "prefill" else f"decode at {self.depth:,}"

    def run(self, subject: Subject) -> Sample:
        if self.kind == "prefill":
            return subject.prefill(self.tokens)
        return subject.decode(self.depth, self.tokens)


def works(plan: Plan) -> list[Work]:
    """In the order in which they are measured: depths grow, so that filling one goes on from the last."""
    prefill = [Work("prefill", 0, n) for n in plan.prefill]
    return prefill + [Work("decode", depth, plan.decode) for depth in sorted(plan.depths)]


def measure(plan: Plan, subjects: Sequence[Subject], progress: Progress) -> list[dict[str, Any]]:
    """One record per work and subject, as they appear in the JSON: medians over plan.runs, in which the
    subjects take turns."""
    records = []
    todo = works(plan)
    total = len(todo) * plan.runs * len(subjects)
    _warm_up(plan, subjects)
    for i, work in enumerate(todo):
        samples: list[list[Sample]] = [[] for _ in subjects]
        for run in range(plan.runs):
            turns = list(zip(subjects, samples, strict=True))
            # Every other time the other way round: whoever comes first gains or loses nothing by it.
            for turn, (subject, taken) in enumerate(turns if run % 2 == 0 else reversed(turns)):
                progress(f"{work}, {subject.name}", (i * plan.runs + run) * len(subjects) + turn, total)
                time.sleep(PAUSE_SECONDS)
                taken.append(work.run(subject))
        records += [record(work, s.name, taken) for s, taken in zip(subjects, samples, strict=True)]
    return records


def measure_opening(plan: Plan, holder: Opens) -> dict[str, Any]:
    """Peak memory so far, and the seconds that opening the model takes once its file is cached."""
    memory = holder.memory()
    memory["added"] = memory["peak"] - memory["before"]
    return {"memory": memory, "open_seconds": spread([holder.open() for _ in range(plan.runs)])}


def record(work: Work, subject: str, samples: Sequence[Sample]) -> dict[str, Any]:
    return {
        "work": str(work),
        **asdict(work),
        "subject": subject,
        "seconds": spread([sample.seconds for sample in samples]),
        "tokens_per_second": spread([work.tokens / sample.seconds for sample in samples]),
        "attention": samples[-1].attention,
        "stages": [asdict(stage) for stage in mean([sample.stages for sample in samples])],
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "runs": list(values),
    }


def _warm_up(plan: Plan, subjects: Sequence[Subject]) -> None:
    """Code, caches and clock: a few tokens of each kind."""
    for subject in subjects:
        subject.prefill(min(64, plan.n_ctx))
        subject.decode(0, min(4, plan.n_ctx))
