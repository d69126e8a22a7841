"""A short measurement of dense attention's speed on this machine, from which times are projected."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyllm.attention import Dense
from pyllm.benchmark.engine import Engine
from pyllm.benchmark.measure import PolicySubject, Progress, measure
from pyllm.benchmark.plan import Plan
from pyllm.errors import ArgumentError
from pyllm.llm import LLM
from pyllm.survey.model_file import ModelFile

FAR = 2048  # tokens, or the context where that is less: the longest prompt and the deepest decode
DECODED = 16  # tokens at each depth


@dataclass(frozen=True)
class Speed:
    """Prefill takes token + pair · pairs of (query, key) per token, decode step + byte · bytes of the KV
    cache. In seconds. What a policy's decision itself costs is not in it."""

    token: float
    pair: float
    step: float
    byte: float

    def prefill_seconds(self, n: NDArray[np.int64], pairs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of prompts of n tokens that compute so many (query, key) pairs per head, elementwise."""
        return self.token * n + self.pair * pairs

    def decode_seconds(self, kv_bytes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of tokens that read so many bytes of the KV cache, elementwise."""
        return self.step + self.byte * kv_bytes


def measure_speed(
    model: ModelFile, n_ctx: int, threads: int | None = None, progress: Progress | None = None
) -> Speed:
    """Opens the model and measures prefill and decode at two lengths each, some seconds for a small model.

    Raises ArgumentError where the context is too short for two, and what opening a model raises.
    """
    far = min(FAR, n_ctx - DECODED)
    near = far // 4
    if near < 1:
        raise ArgumentError(f"a context of {n_ctx} tokens is too short to measure speed in")
    plan = Plan(prefill=(near, far), depths=(near, far), decode=DECODED, runs=3)
    dense = Dense()
    engine = Engine(
        lambda: LLM(model.paths[0], n_threads=threads, attention=dense), plan, lambda _: {dense.name: dense}
    )
    records = measure(plan, [PolicySubject(engine, dense.name)], progress or (lambda *_: None))
    per_token = [record["seconds"]["median"] / record["tokens"] for record in records]
    # The mean query of a prompt of n tokens has (n + 1) / 2 keys, that of DECODED tokens half of these more.
    token, pair = _line((near + 1) / 2, per_token[0], (far + 1) / 2, per_token[1])
    depths = (model.kv_bytes * (depth + (DECODED + 1) / 2) for depth in (near, far))
    step, byte = _line(next(depths), per_token[2], next(depths), per_token[3])
    return Speed(token, pair, step, byte)


def _line(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float]:
    """Intercept and slope of the line through two points, neither of them below 0, as noise could make
    them."""
    slope = max(0.0, (y1 - y0) / (x1 - x0))
    return max(0.0, y1 - slope * x1), slope
