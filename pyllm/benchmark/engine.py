"""pyllm as a thing to measure: one model, one session, any number of policies that take turns on it."""

from __future__ import annotations

import contextlib
import gc
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.attention import Dense, Policy
from pyllm.benchmark.plan import Plan
from pyllm.benchmark.stages import Stage, StageMeter
from pyllm.errors import ArgumentError
from pyllm.guard import Guard
from pyllm.llm import LLM
from pyllm.session import Session


@dataclass(frozen=True)
class Sample:
    """One measurement. attention: what its attention read, in per cent."""

    seconds: float
    stages: list[Stage] = field(default_factory=list)
    attention: dict[str, Any] = field(default_factory=dict)


class Engine:
    """Opens the model with a session for the plan.

    open_llm: makes the LLM. choose: the policies by name, `policies`, which share one session, so that they
    must have the same sinks. `plan` is what of the plan given fits the model's context. Raises
    ArgumentError, and what opening a model raises.
    """

    def __init__(
        self, open_llm: Callable[[], LLM], plan: Plan, choose: Callable[[LLM], Mapping[str, Policy]]
    ) -> None:
        self._open_llm = open_llm
        self._before = _reset_peak()
        started = time.perf_counter()
        self.llm = open_llm()
        self.policies = choose(self.llm)
        self._sinks = _common_sinks(list(self.policies.values()))
        self.plan = plan.fitting(self.llm.n_ctx)
        self.session = self._new_session(self.llm)
        self.first_open_seconds = time.perf_counter() - started
        self.ids = self.plan.ids(self.llm.info.n_vocab)
        self._meter = StageMeter(self.llm)
        self._dense_tokens = 0  # of the session's first ones: evaluated with dense attention

    def _new_session(self, llm: LLM) -> Session:
        return llm.session(n_ctx=self.plan.n_ctx, attention=Dense(sinks=self._sinks))

    def memory(self) -> dict[str, int]:
        """Bytes resident before the model was opened and at most since."""
        # The kernel's counts are a few pages apart: a peak may seem to lie under what it was counted from.
        return {"before": self._before, "peak": max(self._before, _status_bytes("VmHWM"))}

    def open(self) -> float:
        """Closes the model and opens it again, with a session; the seconds that opening took."""
        del self.session, self.llm
        gc.collect()
        started = time.perf_counter()
        self.llm = self._open_llm()
        self.session = self._new_session(self.llm)
        self._dense_tokens = 0
        return time.perf_counter() - started

    def prefill(self, policy: Policy, n: int) -> Sample:
        """Evaluates n tokens into an empty session."""
        self.session.rewind(0)
        self._dense_tokens = n if policy.reads_all else 0
        return self._measure(policy, n, lambda: self.session.eval(self.ids[:n]), decode=False)

    def decode(self, policy: Policy, depth: int, n: int, guard: Guard | None = None) -> Sample:
        """Evaluates n tokens one by one behind `depth` others, which were evaluated with dense attention.

        guard: watches over the n tokens only.
        """
        self._restore(policy, depth)
        self.session.guard = guard

        def steps() -> None:
            for i in range(depth, depth + n):
                self.session.eval(self.ids[i : i + 1])

        try:
            return self._measure(policy, n, steps, decode=True)
        finally:
            self.session.guard = None

    def _restore(self, policy: Policy, depth: int) -> None:
        kept = max(0, min(self._dense_tokens, depth - 1))
        self.session.rewind(kept)
        self.session.attention = Dense(sinks=self._sinks)
        if kept < depth - 1:
            self.session.eval(self.ids[kept : depth - 1])
        self._dense_tokens = max(0, depth - 1)
        if depth:
            # A first token under the policy, so that what rewinding left to be rebuilt is not measured.
            self.session.attention = policy
            self.session.eval(self.ids[depth - 1 : depth])

    def _measure(self, policy: Policy, n: int, work: Callable[[], object], decode: bool) -> Sample:
        session, start = self.session, self.session.position
        session.attention = policy
        stats, counters = session.stats, session._native.stage_stats()
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
        spent = session.stats - stats
        layers: NDArray[np.uint64] = spent.layer_counts
        after = session._native.stage_stats()
        stages = self._meter.stages(policy, counters, after, layers, start, n, decode)
        shown = spent.attention()
        return Sample(seconds, stages, {k: v for k, v in shown.items() if k not in ("evaluated", "guard")})


def _common_sinks(policies: list[Policy]) -> int:
    sinks = {policy.sinks for policy in policies if not policy.reads_all}
    if len(sinks) > 1:
        raise ArgumentError(f"policies measured together need the same sinks, got {sorted(sinks)}")
    return sinks.pop() if sinks else policies[0].sinks


def _reset_peak() -> int:
    """Resident bytes now, from which the peak counts again."""
    # Where the kernel does not offer it, the peak is that of the whole process.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
