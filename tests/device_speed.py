"""Speed with a synthetic model of 8B shape on this machine's GPU: one row of JSON per line, as each is known.

Tokens per second of every policy at every depth, the cache on the GPU and split.
    python tests/device_speed.py SECONDS
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from pyllm import LLM, Adaptive, Dense, InsufficientMemoryError, Session, Window
from pyllm.attention import Policy
from tiny_models import write_tiny

# Llama 3 8B; about Q4_K_M, which has Q6_K in half the layers' attn_v and ffn_down.
SHAPE = {
    "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "dim": 4096, "n_ff": 14336,
    "n_vocab": 128256, "n_ctx_train": 132_096,
}  # fmt: skip
TYPES = {"output": Type.Q6_K, "attn_v": Type.Q6_K, "token_embd": Type.Q4_K, "*": Type.Q4_K}
DEPTHS = (0, 8_000, 32_000, 128_000)
N_PREFILL, N_DECODE = 512, 32

# Local rates of random weights say nothing; these thresholds make all heads long, and all local.
POLICIES: dict[str, Policy] = {
    "dense": Dense(),
    "all long": Adaptive(1.1),
    "all local": Adaptive(0.0),
    "pages": Adaptive(1.1, page_bits=3, page_share=0.01),
}


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def largest_session(llm: LLM) -> Session:
    """For the greatest depth whose KV cache fits."""
    for depth in reversed(DEPTHS[1:]):
        with contextlib.suppress(InsufficientMemoryError):
            return llm.session(n_ctx=depth + N_PREFILL + N_DECODE)
    return llm.session(n_ctx=N_PREFILL + N_DECODE)


def speed(seconds: float) -> Iterator[dict[str, Any]]:
    """Rows, as many as time allows."""
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "synthetic-8b.gguf"
        write_tiny(path, types=TYPES, tied=False, tokenizer=True, same_layers=True, **SHAPE)  # type: ignore[arg-type]
        llm = LLM(path, device="cuda", attention=Adaptive())
        for llm.kv in ("gpu", "split"):
            left = end - time.monotonic()
            for row in rows_of(largest_session(llm), end if llm.kv == "split" else end - 0.4 * left):
                yield {"kv": llm.kv} | row


def rows_of(session: Session, end: float) -> Iterator[dict[str, Any]]:
    ids = np.random.default_rng(0).integers(0, SHAPE["n_vocab"], session.n_ctx)
    taken: dict[str, float] = {}  # seconds for each policy at the last depth
    last = 0
    for depth in (depth for depth in DEPTHS if depth + N_PREFILL + N_DECODE <= session.n_ctx):
        fill(session, ids, depth, end)
        grown = (depth + N_PREFILL) / (last + N_PREFILL)
        for name, policy in POLICIES.items():
            if session.position < depth or time.monotonic() + grown * taken.get(name, 0.0) > end:
                continue
            session.attention = policy
            started = time.monotonic()
            yield {"depth": depth, "attention": name} | speeds(session, ids)
            taken[name] = time.monotonic() - started
        last = depth


def fill(session: Session, ids: NDArray[np.int64], depth: int, end: float) -> None:
    session.attention = Window()  # of random weights it does not matter what the cache holds
    while session.position < depth and time.monotonic() < end:
        session.eval(ids[session.position : min(depth, session.position + 4 * N_PREFILL)])


def speeds(session: Session, ids: NDArray[np.int64]) -> dict[str, float]:
    """From where the session is, which it is at again afterwards."""
    depth = session.position
    session.eval(ids[depth : depth + 2])  # moments and sketches catch up
    session.rewind(depth)
    prefill = timed(lambda: session.eval(ids[-N_PREFILL:]))
    session.eval(ids[:1])  # kernels are loaded and
    session.eval(ids[1:2])  # a token's graph is written
    decode = timed(lambda: [session.eval([int(t)]) for t in ids[2:N_DECODE]])
    session.rewind(depth)
    return {
        "prefill_tokens_per_second": N_PREFILL / prefill,
        "decode_tokens_per_second": (N_DECODE - 2) / decode,
    }


if __name__ == "__main__":
    for found in speed(float(sys.argv[1])):
        print(json.dumps(found), flush=True)
