"""How long the stages of an 8B model take on this machine's GPU: one row of JSON per line, as each is known.

Products with matrices for decode (one token) and prefill (512), with the bandwidth and the multiply-adds that
they reach; the attention of one token at several depths, dense, and with four fifths of the bulk skipped.
    python tests/device_stages.py SECONDS
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from emulated import check, ffi, lib
from tiny_models import random_matrix

TYPES = (
    Type.Q8_0,
    Type.Q4_K,
    Type.Q6_K,
    Type.Q4_0,
    Type.Q4_1,
    Type.Q5_K,
    Type.Q5_0,
    Type.Q3_K,
    Type.Q2_K,
    Type.IQ4_XS,
)
GATE, DOWN, KEYS = (14336, 4096), (4096, 14336), (1024, 4096)  # rows, columns of Llama 3 8B's matrices
PREFILL = 512
MATRICES_BYTES = 1 << 29  # more than any cache holds
N_LAYERS, N_HEADS, N_KV_HEADS, HEAD_DIM, N_SINK, N_WINDOW = 32, 32, 8, 128, 4, 1024
DEPTHS = (8_000, 32_000, 128_000)
STAGES = ("rope_store", "attend_local", "select", "attend_bulk", "finish")
READ = 0.2  # of the bulk's bytes, the sketch's included
N_THREADS = 8


def tile_bytes(kind: Type, cols: int) -> int:
    """Of 16 rows as the library packs them, by the traits of their type."""
    traits = ffi.new("hook_quant_traits *")
    check(lib.hook_quant_type(kind.value, traits))
    kinds = 1 + traits.has_min
    scales = (
        (32 + 256 // traits.group * 16) * kinds * cols // 256 if traits.scaled else 32 * kinds * cols // 32
    )
    return int(-(-scales // 64) * 64 + cols * 16 * traits.bits // 8)


def matrices(kind: Type, shape: tuple[int, int], n: int, repeats: int = 5) -> dict[str, Any]:
    """A product of n tokens with one matrix, among so many that none is in a cache."""
    rows, cols = shape
    n_bytes = rows // 16 * tile_bytes(kind, cols)
    copies = -(-MATRICES_BYTES // n_bytes) if n == 1 else 4
    one = random_matrix(np.random.default_rng(0), kind, 256, cols, 1.0)
    weights = np.tile(np.ascontiguousarray(one).view(np.uint8).reshape(256, -1), (rows // 256, 1))
    seconds = np.zeros(repeats)
    err = ffi.new("pyllm_error *")
    check(
        lib.hook_time_linear(
            b"cuda", N_THREADS, kind.value, ffi.from_buffer(weights), rows, cols, n, copies, repeats,
            ffi.from_buffer("double[]", seconds), err,
        ),
        err,
    )  # fmt: skip
    taken = float(np.median(seconds)) / copies
    row = {"stage": "linear", "type": kind.name, "rows": rows, "cols": cols, "tokens": n, "us": 1e6 * taken}
    return row | {"gb_s": 1e-9 * n_bytes / taken, "tera_multiply_adds_s": 1e-12 * n * rows * cols / taken}


def attention(
    q: NDArray[np.float32], k: NDArray[np.float32], depth: int, n_layers: int, policy: str,
    share: float = 0.0, local_heads: int = 0, repeats: int = 5, graded: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One token's stages. share: of the page tier, 0 for none, by 3 bits or graded; local_heads: so many of a
    layer are local."""
    thresholds = np.full((n_layers, N_HEADS), 1.1, np.float32)
    thresholds[:, :local_heads] = 0.0
    attention = ffi.new("pyllm_attention *")
    attention.policy = {"dense": lib.PYLLM_DENSE, "adaptive": lib.PYLLM_ADAPTIVE}[policy]
    attention.granularity, attention.n_window = lib.PYLLM_GROUP, N_WINDOW
    attention.thresholds = ffi.from_buffer("float[]", thresholds)
    if share:
        attention.page_bits, attention.page_drop = 3, 1.0
        attention.page_share = attention.decode_share = share
    order = np.tile(np.arange(HEAD_DIM, dtype=np.uint16), (n_layers, N_KV_HEADS, 1))
    usual = np.ones((n_layers, N_KV_HEADS, HEAD_DIM), np.float32)
    if graded:
        attention.page_bits, attention.page_rest = lib.PYLLM_GRADED, 0.6
        attention.channels = ffi.from_buffer("uint16_t[]", order)
        attention.query_means = ffi.from_buffer("float[]", usual)
    shape = ffi.new(
        "hook_time_shape *",
        (n_layers, N_HEADS, N_KV_HEADS, HEAD_DIM, N_SINK, depth, len(q), HEAD_DIM**-0.5),
    )
    seconds = np.zeros((len(STAGES), repeats))
    stats, err = ffi.new("pyllm_layer_stats *"), ffi.new("pyllm_error *")
    check(
        lib.hook_time_attention(
            b"cuda", N_THREADS, shape, attention, ffi.from_buffer("float[]", q),
            ffi.from_buffer("float[]", k), repeats, ffi.from_buffer("double[]", seconds), stats, err,
        ),
        err,
    )  # fmt: skip
    us = 1e6 * np.median(seconds, 1) / n_layers
    return {
        "stage": "attention", "depth": depth, "tokens": len(q), "attention": policy, "page_share": share,
        "graded": graded,
        "local_heads": local_heads, "bulk_bytes_read": stats.bytes_read / max(stats.bytes, 1),
        "us_per_layer": dict(zip(STAGES, us.round(2).tolist(), strict=True)),
    }  # fmt: skip


def share_that_reads(
    q: NDArray[np.float32], k: NDArray[np.float32], depth: int, read: float, graded: bool
) -> float:
    """The page share at which about so much of the bulk's bytes is read, by bisection on one layer."""
    low, high = 1e-8, 1e-1
    for _ in range(10):
        share = (low * high) ** 0.5
        more = attention(q, k, depth, 1, "dense", share, repeats=1, graded=graded)["bulk_bytes_read"] > read
        low, high = (share, high) if more else (low, share)
    return high


def depth_rows(depth: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(depth)
    k = rng.standard_normal((depth + 1, N_KV_HEADS, HEAD_DIM), np.float32)
    q = 2 * rng.standard_normal((1, N_HEADS, HEAD_DIM), np.float32)  # scores of 2 nats' deviation
    n_layers = min(N_LAYERS, 2**20 // depth)
    yield attention(q, k, depth, n_layers, "dense")
    for graded in (False, True):
        share = share_that_reads(q, k, depth, READ, graded)
        yield attention(q, k, depth, n_layers, "dense", share, graded=graded)
    yield attention(q, k, depth, n_layers, "adaptive", local_heads=N_HEADS * 3 // 4)
    yield attention(q, k, depth, n_layers, "adaptive", local_heads=N_HEADS)


def rows(seconds: float) -> Iterator[dict[str, Any]]:
    end = time.monotonic() + seconds
    for kind in TYPES:
        for shape in (GATE, DOWN, KEYS) if kind in (Type.Q4_K, Type.Q8_0) else (GATE,):
            yield matrices(kind, shape, 1)
        yield matrices(kind, GATE, PREFILL)
        if time.monotonic() > end:
            return
    for depth in DEPTHS:
        if time.monotonic() > end - 10:
            return
        yield from depth_rows(depth)


if __name__ == "__main__":
    for row in rows(float(sys.argv[1])):
        print(json.dumps(row), flush=True)
