"""Adaptive attention of one layer: geometry, masses, head selection, output, statistics.

Scores, masses and outputs are float64 over keys and values as the KV cache stores them, so that what
differs from the native library is the library's rounding. Axes: T queries, S positions, H query heads,
G key/value heads, d = head_dim.

A query at position t always reads the sinks, the first positions, and the window, the last ones. Between
them lies the bulk, in whole pages, which a head reads only where it is long. L is the logsumexp of the
scores over sinks and window, M over the bulk, M̂ the estimate of M from the moments of the bulk's keys
(arXiv 2502.09647), and a head is local for this query iff sigmoid(L − M̂) >= τ.

Without page_bits a long head reads the whole bulk, and no result depends on how a prompt is cut into
batches. With page_bits it reads what its tile of queries wants, see `sketch`; batches cut tiles, so results
depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .kv_cache import halves, stored_keys, stored_values, token_bytes
from .moments import Moments, bulk_mass, score_moments
from .rest import Rest, usual_values
from .sketch import (
    BITS,
    GRADED,
    READ_PAGE,
    PageBits,
    Sketch,
    heads_sharing,
    n_sketched,
    page_bytes,
    read_pages,
    sketch,
)

PAGE = 64

POLICIES = ("dense", "window", "static", "oracle", "adaptive")


@dataclass(frozen=True)
class Policy:
    """How attention decides what to read.

    thresholds: τ, a number, (n_heads) or (n_layers, n_heads); rounded to float32, as the library takes them.
    static_local: bool, shaped likewise, True where a head is always local; needed by kind "static" only.
    gaussian, estimate: the forms of `moments.log_mean_exp` and `moments.bulk_mass`.
    coefficients: (n_layers, n_heads, 3) of estimates by regression; float32, as the library takes them.
    means, covariances: (n_layers, G, d), (n_layers, G, d, d) of other text's keys, in place of the bulk's.
    page_bits: of the key sketch that tells a long head what to read: 2, 3, 4, or "graded", in the order of
    channels, (n_layers, G, d), by default as they stand; 0 reads the whole bulk.
    page_share, decode_share, page_drop: a head wants the read pages whose share exceeds page_share, or for a
    query that is a tile by itself, as in decode, decode_share (None: the same), or less until those it does
    not want hold at most page_drop (1: no bound); rounded to float32, as the library takes them.
    page_rest, query_means: of a token that is a batch by itself, what is not read counts page_rest times its
    estimated weight (0: not at all), with values as the mean queries, (n_layers, G, d), weigh them.
    """

    kind: str = "dense"
    n_sink: int = 16
    n_window: int = 1024
    granularity: str = "head"
    thresholds: npt.ArrayLike = 0.9
    static_local: npt.ArrayLike | None = None
    gaussian: str = "lognormal"
    estimate: str = "gaussian"
    coefficients: npt.NDArray[np.float32] | None = None
    means: npt.NDArray[np.float32] | None = None
    covariances: npt.NDArray[np.float32] | None = None
    page_bits: PageBits = 0
    page_share: float = 0.005
    decode_share: float | None = None
    page_drop: float = 1.0
    channels: npt.NDArray[np.uint16] | None = None
    page_rest: float = 0.0
    query_means: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.kind not in POLICIES:
            raise ValueError(f"kind is {self.kind!r}, expected one of {POLICIES}")
        if self.granularity not in ("head", "group"):
            raise ValueError(f"granularity is {self.granularity!r}, expected 'head' or 'group'")
        if self.kind == "static" and self.static_local is None:
            raise ValueError("kind is 'static' but static_local is missing")
        if self.page_bits not in (0, *BITS, GRADED):
            raise ValueError(f"page_bits is {self.page_bits!r}, expected 0, {GRADED!r} or one of {BITS}")
        if self.page_rest and (self.page_bits != GRADED or self.query_means is None):
            raise ValueError(f"page_rest is {self.page_rest}, without a graded sketch and query_means")
        for name in ("page_share", "decode_share", "page_drop", "page_rest"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} is {value}, expected >= 0")
        if self.n_window < 1 or not 0 <= self.n_sink <= PAGE:
            raise ValueError(
                f"n_window is {self.n_window} and n_sink {self.n_sink}, expected >= 1 and 0..{PAGE}"
            )

    def cut(self, n: int) -> float:
        """The share above which the heads of a tile of n queries want a read page."""
        return self.page_share if n > 1 or self.decode_share is None else self.decode_share


@dataclass(frozen=True)
class Decisions:
    """What one layer decided, per query; masses are −inf where the bulk is empty.

    has_bulk: (T) bool. local: (T, H) bool, True where nothing of the bulk was read.
    local_mass, bulk_mass_estimate, bulk_mass_true: (T, H) float64, natural logs: L, M̂, M.
    mean_score, deviation: (T, H) float64, c·q·μ and σ that M̂ is made of; NaN where the bulk is empty.
    reads: (T, H, R) bool, the read pages of the bulk of the last query that a head reads, which is then long.
    scored: (T, H) bool, True where a long head scored the sketch; False everywhere without it.
    rested: (T, H) bool, True where something stands for what a long head leaves out, if it does.
    """

    has_bulk: npt.NDArray[np.bool_]
    local: npt.NDArray[np.bool_]
    local_mass: npt.NDArray[np.float64]
    bulk_mass_estimate: npt.NDArray[np.float64]
    bulk_mass_true: npt.NDArray[np.float64]
    mean_score: npt.NDArray[np.float64]
    deviation: npt.NDArray[np.float64]
    reads: npt.NDArray[np.bool_]
    scored: npt.NDArray[np.bool_]
    rested: npt.NDArray[np.bool_]


@dataclass
class LayerStats:
    """Counts of one layer, defined as pyllm_layer_stats in pyllm.h."""

    pairs: int = 0
    pairs_local: int = 0
    work: int = 0
    work_done: int = 0
    bytes: int = 0
    bytes_read: int = 0
    pages: int = 0
    pages_read: int = 0
    work_sketch: int = 0


@dataclass(frozen=True)
class AttentionResult:
    """output: (T, H, d) float32. moments: (G) of the bulk of the last query."""

    output: npt.NDArray[np.float32]
    decisions: Decisions
    stats: LayerStats
    moments: list[Moments] = field(default_factory=list)


def bulk_end(t: int, n_sink: int, n_window: int, page: int = PAGE) -> int:
    """First position after the bulk [n_sink, bulk_end) of the query at position t."""
    return n_sink + page * (max(0, t + 1 - n_window - n_sink) // page)


def tiles(
    first: int, stop: int, n_sink: int, n_window: int, chunk: int | None = None
) -> Iterator[tuple[int, int]]:
    """Cuts query positions [first, stop) wherever bulk_end moves, at most a page each, and every chunk."""
    start = first
    for t in range(first + 1, stop + 1):
        moves = (t + 1 - n_window - n_sink) % PAGE == 0
        if t == stop or moves or (chunk and (t - first) % chunk == 0):
            yield start, t
            start = t


def bfloat16(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rounded to 8 bits of mantissa, to nearest, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.asarray(bits.view(np.float32).astype(np.float64))


# What the factors of scores and outputs are rounded to, by the arithmetic of the kernels.
PRODUCTS: dict[str, Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]] = {
    "float": lambda x: x,
    "bfloat16": bfloat16,
}


def attend(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    scale: float,
    policy: Policy,
    layer: int = 0,
    chunk: int | None = None,
    products: str = "float",
    kv_type: str = "f16",
) -> AttentionResult:
    """The attention of one layer.

    q: (T, H, d) of the last T of S positions, RoPE applied. k (RoPE applied), v: (S, G, d) of all positions.
    scale: c, by which scores are multiplied. layer: the row of the policy's thresholds and labels. chunk: how
    many queries make a batch, all T by default; it matters only where page_bits is set. products: one of
    PRODUCTS; "bfloat16" rounds scaled queries, keys and values before they are multiplied (but not weights).
    kv_type: one of KV_TYPES.
    """
    n_queries, n_heads, head_dim = np.shape(q)
    n_positions, n_kv_heads, _ = np.shape(k)
    first = n_positions - n_queries
    queries = by_head(np.asarray(q).astype(np.float64), n_kv_heads)
    keys = stored_keys(k, kv_type).transpose(1, 0, 2)
    values = stored_values(v, kv_type).transpose(1, 0, 2)
    summed_up = halves(keys)  # what moments, sketches and values that stand for pages are made of
    sketches = sketch_bulk(summed_up, policy, layer)
    usual = usual_of_bulk(summed_up, halves(values), scale, policy, layer)
    rounded = PRODUCTS[products]
    factors, values = rounded(keys), rounded(values)

    output = np.empty((n_queries, n_heads, head_dim), np.float32)
    has_bulk = np.zeros(n_queries, bool)
    local = np.ones((n_queries, n_heads), bool)
    masses = np.full((3, n_queries, n_heads), -np.inf)
    mean_score, deviation = np.full((2, n_queries, n_heads), np.nan)
    reads = np.zeros((n_queries, n_heads, n_read_pages(n_positions - 1, policy)), bool)
    scored, rested = np.zeros((2, n_queries, n_heads), bool)
    moments = [Moments.empty(head_dim) for _ in range(n_kv_heads)]
    for start, stop in tiles(first, n_positions, policy.n_sink, policy.n_window, chunk):
        end = bulk_end(start, policy.n_sink, policy.n_window)
        moments = [fold_pages(m, summed_up[g], policy.n_sink, end) for g, m in enumerate(moments)]
        rows = slice(start - first, stop - first)
        tile = queries[:, :, rows]  # (G, H/G, n, d)
        scores = rounded(scale * tile) @ factors[:, None, :stop].swapaxes(-1, -2)  # (G, H/G, n, stop)
        in_bulk, in_local = position_masks(start, stop, policy.n_sink, end)

        masses[0, rows] = by_query(log_sum_exp(scores, in_local))
        known = calibrated(moments, policy, layer)
        masses[1, rows] = by_query(estimated_masses(tile, known, scale, policy, layer))
        mean_score[rows], deviation[rows] = map(by_query, score_moments_of(tile, known, scale))
        masses[2, rows] = by_query(log_sum_exp(scores, in_bulk))
        n_read = n_read_pages(start, policy)
        has_bulk[rows] = n_read > 0
        if n_read:
            local[rows] = select(masses[:, rows], n_kv_heads, policy, layer)
            reads[rows, :, :n_read], scored[rows] = list_reads(
                tile, ~local[rows], masses[0, rows], n_read, sketches, scale, policy
            )
        visible = in_local | positions_read(reads[rows, :, :n_read], n_kv_heads, policy.n_sink, stop)
        attended = softmax(scores, visible) @ values[:, None, :stop]
        if policy.page_rest and n_read and is_batch(start - first, n_queries, chunk):
            rested[rows] = ~local[rows]
            of_token = rested[rows], reads[rows, :, :n_read], masses[0, rows]
            long, read, mass = (by_head(x, n_kv_heads)[:, :, 0] for x in of_token)
            rest = Rest.of(tile[:, :, 0], long, read, mass, sketches, usual, scale, policy.page_rest)
            attended[:, :, 0] = rest.joined(attended[:, :, 0], log_sum_exp(scores, visible)[:, :, 0])
        output[rows] = attended.transpose(2, 0, 1, 3).reshape(stop - start, n_heads, head_dim)

    decisions = Decisions(
        has_bulk, local, masses[0], masses[1], masses[2], mean_score, deviation, reads, scored, rested
    )
    return AttentionResult(
        output, decisions, count(decisions, first, n_kv_heads, head_dim, policy, kv_type), moments
    )


def fold_pages(moments: Moments, keys: npt.NDArray[np.float64], n_sink: int, end: int) -> Moments:
    """Merges, page by page, the keys (S, d) between what moments already hold and the end of the bulk."""
    for start in range(n_sink + moments.n, end, PAGE):
        moments = moments.merged(Moments.of(keys[start : start + PAGE]))
    return moments


def position_masks(
    start: int, stop: int, n_sink: int, end: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """(stop − start, stop) masks of the bulk and of sinks and window, for queries at [start, stop)."""
    position = np.arange(stop)
    causal = position <= np.arange(start, stop)[:, None]
    bulk = (position >= n_sink) & (position < end)
    return causal & bulk, causal & ~bulk


def estimated_masses(
    tile: npt.NDArray[np.float64], moments: list[Moments], scale: float, policy: Policy, layer: int
) -> npt.NDArray[np.float64]:
    """M̂ (G, H/G, n) of queries (G, H/G, n, d)."""
    n_kv_heads, group = tile.shape[:2]
    b = np.zeros((n_kv_heads * group, 3)) if policy.coefficients is None else policy.coefficients[layer]
    b = b.reshape(n_kv_heads, group, 3)
    return np.array(
        [
            [bulk_mass(tile[g, h], m, scale, policy.gaussian, policy.estimate, b[g, h]) for h in range(group)]
            for g, m in enumerate(moments)
        ]
    )


def calibrated(moments: list[Moments], policy: Policy, layer: int) -> list[Moments]:
    """What the policy takes the bulks' keys to be like."""
    if policy.means is None or policy.covariances is None:
        return moments
    models = zip(moments, policy.means[layer], policy.covariances[layer], strict=True)
    return [m.like(mean.astype(np.float64), cov.astype(np.float64)) for m, mean, cov in models]


def score_moments_of(
    tile: npt.NDArray[np.float64], moments: list[Moments], scale: float
) -> npt.NDArray[np.float64]:
    """(2, G, H/G, n) mean and deviation of scores, NaN where the bulk is empty."""
    found = np.full((2, *tile.shape[:3]), np.nan)
    for g, m in enumerate(moments):
        for h in range(tile.shape[1] if m.n else 0):
            mean, variance = score_moments(tile[g, h], m, scale)
            found[:, g, h] = mean, np.sqrt(variance)
    return found


def select(
    masses: npt.NDArray[np.float64], n_kv_heads: int, policy: Policy, layer: int
) -> npt.NDArray[np.bool_]:
    """Head selection for queries that have a bulk: (n, H) bool, True where local.

    masses: (3, n, H), L, M̂ and M. Granularity "group" keeps a head local only if its whole group is.
    """
    local_mass, estimate, true_mass = masses
    local = np.zeros(local_mass.shape, bool)
    if policy.kind == "window":
        local[:] = True
    elif policy.kind == "static":
        local[:] = layer_row(np.asarray(policy.static_local, bool), layer)
    elif policy.kind in ("oracle", "adaptive"):
        bulk = true_mass if policy.kind == "oracle" else estimate
        local = sigmoid(local_mass - bulk) >= layer_row(np.asarray(policy.thresholds, np.float32), layer)
    if policy.granularity == "group":
        groups = local.reshape(len(local), n_kv_heads, -1)
        local = np.broadcast_to(groups.all(axis=2, keepdims=True), groups.shape).reshape(local.shape)
    return local


def layer_row(x: npt.NDArray[Any], layer: int) -> npt.NDArray[Any]:
    """A layer's row of (n_layers, n_heads); a number or one row (n_heads) holds for every layer."""
    return x[layer] if x.ndim == 2 else x


def n_read_pages(t: int, policy: Policy) -> int:
    """In the bulk of the query at position t."""
    return (bulk_end(t, policy.n_sink, policy.n_window) - policy.n_sink) // READ_PAGE


def sketch_bulk(keys: npt.NDArray[np.float64], policy: Policy, layer: int) -> list[Sketch]:
    """(G) of the bulk of the last of keys (G, S, d); none without page_bits."""
    if not policy.page_bits:
        return []
    end = bulk_end(keys.shape[1] - 1, policy.n_sink, policy.n_window)
    bulk = keys[:, policy.n_sink : end].reshape(len(keys), -1, PAGE, keys.shape[2])
    orders = [None] * len(keys) if policy.channels is None else policy.channels[layer]
    return [sketch(pages, policy.page_bits, order) for pages, order in zip(bulk, orders, strict=True)]


def usual_of_bulk(
    keys: npt.NDArray[np.float64],
    values: npt.NDArray[np.float64],
    scale: float,
    policy: Policy,
    layer: int,
) -> list[npt.NDArray[np.float32]]:
    """(G) of `rest.usual_values` of the bulk of the last of keys and values (G, S, d); none without a graded
    sketch."""
    if policy.page_bits != GRADED or policy.query_means is None:
        return []
    end = bulk_end(keys.shape[1] - 1, policy.n_sink, policy.n_window)
    shape = len(keys), -1, PAGE, keys.shape[2]
    pages = (x[:, policy.n_sink : end].reshape(shape) for x in (keys, values))
    by_head = zip(*pages, policy.query_means[layer], strict=True)
    return [usual_values(k, v, query, scale) for k, v, query in by_head]


def is_batch(query: int, n_queries: int, chunk: int | None) -> bool:
    """Whether a query of n, cut every chunk, is a batch by itself."""
    size = chunk or n_queries
    return min(size, n_queries - query // size * size) == 1


def list_reads(
    tile: npt.NDArray[np.float64],
    is_long: npt.NDArray[np.bool_],
    local_mass: npt.NDArray[np.float64],
    n_read: int,
    sketches: list[Sketch],
    scale: float,
    policy: Policy,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Read pages that a tile's heads read, (n, H, n_read), and where they scored the sketch, (n, H).

    tile: (G, H/G, n, d). is_long, local_mass: (n, H). n_read: read pages in the tile's bulk.
    """
    group, n = tile.shape[1:3]
    reads = np.repeat(is_long[..., None], n_read, axis=2)
    scored = np.zeros(is_long.shape, bool)
    n_sharing = heads_sharing(n, group)
    for g, s in enumerate(sketches):
        bulk = s.first(n_read * READ_PAGE // PAGE)
        for first in range(0, group, n_sharing):
            queries = tile[g, first : first + n_sharing]
            heads = slice(g * group + first, g * group + first + n_sharing)
            long, mass = is_long[:, heads].T, local_mass[:, heads].T
            wanted, asked = read_pages(queries, long, mass, bulk, scale, policy.cut(n), policy.page_drop)
            reads[:, heads] &= wanted
            scored[:, heads] = asked[:, None] & is_long[:, heads]
    return reads, scored


def positions_read(
    reads: npt.NDArray[np.bool_], n_kv_heads: int, n_sink: int, stop: int
) -> npt.NDArray[np.bool_]:
    """(G, H/G, n, stop) mask of what heads read of the bulk, by reads (n, H, R)."""
    in_list = np.repeat(by_head(reads, n_kv_heads), READ_PAGE, axis=3)
    mask = np.zeros((*in_list.shape[:3], stop), bool)
    mask[..., n_sink : n_sink + in_list.shape[3]] = in_list
    return mask


def count(
    decisions: Decisions, first: int, n_kv_heads: int, head_dim: int, policy: Policy, kv_type: str
) -> LayerStats:
    """Statistics over the queries at positions first, first + 1, ...; a query without bulk counts nowhere."""
    stats = LayerStats()
    n_heads = decisions.local.shape[1]
    key_and_value = token_bytes(kv_type, head_dim)
    for row in np.flatnonzero(decisions.has_bulk):
        n_pages = n_read_pages(first + int(row), policy)
        n_bulk = n_pages * READ_PAGE
        reads = decisions.reads[row]  # (H, R)
        by_group = reads.reshape(n_kv_heads, n_heads // n_kv_heads, reads.shape[1]).any(axis=1)
        stats.pairs += n_heads
        stats.pairs_local += int(decisions.local[row].sum())
        stats.work += n_heads * n_bulk * 2 * head_dim
        stats.work_done += int(reads.sum()) * READ_PAGE * 2 * head_dim
        stats.bytes += n_kv_heads * n_bulk * key_and_value
        stats.bytes_read += int(by_group.sum()) * READ_PAGE * key_and_value
        if policy.page_bits:
            sketch_bytes = n_bulk // PAGE * page_bytes(head_dim, policy.page_bits)
            scored = decisions.scored[row]  # (H)
            scoring = int(scored.sum()) * n_bulk * n_sketched(policy.page_bits, head_dim)
            stats.work_done += scoring
            stats.work_sketch += scoring
            stats.bytes_read += int(scored.reshape(n_kv_heads, -1).any(axis=1).sum()) * sketch_bytes
        rested = decisions.rested[row]
        value_bytes = n_bulk // PAGE * 2 * head_dim
        standing = int(rested.sum()) * n_bulk // PAGE * head_dim
        stats.work_done += standing
        stats.work_sketch += standing
        stats.bytes_read += int(rested.reshape(n_kv_heads, -1).any(axis=1).sum()) * value_bytes
        has_long = ~decisions.local[row].reshape(n_kv_heads, -1).all(axis=1)
        stats.pages += int(has_long.sum()) * n_pages
        stats.pages_read += int(by_group.sum())
    return stats


def by_head(x: npt.NDArray[Any], n_kv_heads: int) -> npt.NDArray[Any]:
    """(n, H, ...) -> (G, H/G, n, ...)."""
    n, n_heads, *rest = x.shape
    return np.moveaxis(x.reshape(n, n_kv_heads, n_heads // n_kv_heads, *rest), 0, 2)


def by_query(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(G, H/G, n) -> (n, H)."""
    return np.transpose(x.reshape(-1, x.shape[-1]))


def log_sum_exp(scores: npt.NDArray[np.float64], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Over the last axis where mask holds; −inf where it holds nowhere."""
    largest = np.max(scores, axis=-1, keepdims=True, where=mask, initial=-np.inf)
    shift = np.where(np.isfinite(largest), largest, 0.0)
    total = np.exp(np.where(mask, scores - shift, -np.inf)).sum(axis=-1)
    log_total = np.log(total, where=total > 0, out=np.full(total.shape, -np.inf))
    return np.asarray(log_total + shift[..., 0])


def softmax(scores: npt.NDArray[np.float64], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Over the last axis where mask holds, 0 elsewhere; mask holds somewhere in every row."""
    log_total = log_sum_exp(scores, mask)[..., None]
    return np.asarray(np.exp(np.where(mask, scores, -np.inf) - log_total))


def sigmoid(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return 0.5 * (1.0 + np.tanh(0.5 * x))
