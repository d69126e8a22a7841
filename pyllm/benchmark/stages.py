"""What each stage of an evaluation did: time, bytes read and multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyllm.attention import Adaptive, Policy
from pyllm.llm import LLM

PAGES = 1024  # tokens of whole pages, whatever the sinks
FLOAT_TYPES = ("F32", "F16", "BF16")
# The weight matrix that tells whether a stage multiplies integers: part of a tensor's name.
MATRICES = {
    "qkv": ".attn_q.",
    "attention_out": ".attn_output.",
    "gate_up": ".ffn_gate.",
    "down": ".ffn_down.",
}


@dataclass(frozen=True)
class Stage:
    """bytes: weights and KV cache read, 0 where that is not counted. multiply_adds: of the model's own
    arithmetic, however many the kernels make of them. arithmetic: the peak it is measured against."""

    name: str
    seconds: float
    bytes: int
    multiply_adds: int
    arithmetic: str


# What `NativeSession.stage_stats` gives.
Counters = Sequence[tuple[str, int, int, int]]


class StageMeter:
    """Turns the counters of a session into stages."""

    def __init__(self, llm: LLM) -> None:
        self._info = llm.info
        self._token_bytes = (llm.kv_bytes(2 * PAGES) - llm.kv_bytes(PAGES)) / PAGES
        types = {tensor.name: tensor.type_name for tensor in llm.tensors()}
        output = types.get("output.weight", types["token_embd.weight"])
        found = {
            stage: next(kind for name, kind in types.items() if part in name)
            for stage, part in MATRICES.items()
        }
        self._quantized = {
            name for name, kind in {**found, "logits": output}.items() if kind not in FLOAT_TYPES
        }

    def stages(
        self,
        policy: Policy,
        before: Counters,
        after: Counters,
        layers: NDArray[np.uint64],
        start: int,
        n: int,
        decode: bool,
    ) -> list[Stage]:
        """What happened between two readings, in which n tokens were evaluated at position `start`, one by
        one where `decode`. layers: (n_layers, 9) the attention counts of the same time (`Stats`)."""
        info = self._info
        keys = n * start + n * (n + 1) // 2
        pairs, _, bulk, done, *_, scored = (int(count) for count in layers.sum(axis=0))
        per_key = 2 * info.head_dim  # multiply-adds: a score and a value
        local = keys * info.n_heads * info.n_layers - bulk // per_key
        moments = pairs * info.head_dim**2 if isinstance(policy, Adaptive) else 0
        multiply_adds = {
            **self._linear(n, n if decode else 1),
            "attend_local": local * per_key,
            "attend_bulk": done - scored,
            "select": moments + scored,
        }
        # One query reads every key once for all heads of a group; more queries share a read.
        local_bytes = round(local / info.n_heads / info.n_layers * self._token_bytes) if decode else 0
        return [
            Stage(
                name,
                (ns - ns_before) / 1e9,
                (bytes_ - bytes_before) or (local_bytes if name == "attend_local" else 0),
                multiply_adds.get(name, 0),
                "int8" if name in self._quantized else "f32",
            )
            for (name, _, ns, bytes_), (_, _, ns_before, bytes_before) in zip(after, before, strict=True)
        ]

    def _linear(self, n: int, n_logits: int) -> dict[str, int]:
        """Multiply-adds of the weight matrices."""
        info = self._info
        q_width, kv_width = info.n_heads * info.head_dim, info.n_kv_heads * info.head_dim
        per_layer = {
            "qkv": info.dim * (q_width + 2 * kv_width),
            "attention_out": q_width * info.dim,
            "gate_up": 2 * info.dim * info.n_ff,
            "down": info.n_ff * info.dim,
        }
        total = {name: n * info.n_layers * count for name, count in per_layer.items()}
        return {**total, "logits": n_logits * info.dim * info.n_vocab}


def mean(runs: Sequence[Sequence[Stage]]) -> list[Stage]:
    """The stages of an average run."""
    n = len(runs)
    return [
        Stage(
            same[0].name,
            sum(stage.seconds for stage in same) / n,
            sum(stage.bytes for stage in same) // n,
            sum(stage.multiply_adds for stage in same) // n,
            same[0].arithmetic,
        )
        for same in zip(*runs, strict=True)
    ]
