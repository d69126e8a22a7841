"""The page tier: which read pages of the bulk the long heads of a tile read, judged by a low-bit key sketch.

A sketch rounds the keys of a page, 64 tokens of one key/value head, to 2, 3 or 4 bits between the least and
the greatest value of each channel; a graded one takes the channels in a given order, has 4 bits for the first
quarter of them, 2 for the second, and for the rest only their mean. Scores estimated from it give every read
page, 16 tokens, its share of a query head's attention, and a head wants the read pages whose share exceeds a
cut. In a tile the long queries of a head read what any scored one of them wants, and where the rows of a tile
and key/value head are few, so do all its heads: so with this tier results depend on how a prompt is cut into
batches.

Axes: P pages, R = 4 P read pages, d = head_dim; one key/value head everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

READ_PAGE = 16
SCORED_MOST = 16
SHARED_ROWS = 64
MAX_HALVINGS = 16
BITS = (2, 3, 4)
GRADED = "graded"
PageBits = int | str  # 0, no sketch, one of BITS, or GRADED


@dataclass(frozen=True)
class Sketch:
    """Key i of a page is about lo + step * codes[i]. lo, step: (P, d), values of f16; step is 0 in channels
    without bits. codes: (P, 64, d)."""

    lo: Floats
    step: Floats
    codes: npt.NDArray[np.uint8]

    def first(self, n_pages: int) -> Sketch:
        return Sketch(self.lo[:n_pages], self.step[:n_pages], self.codes[:n_pages])


def grades(page_bits: PageBits, head_dim: int) -> list[tuple[int, int]]:
    """(bits, channels) of the runs of channels with equally many bits, in the sketch's order. A quarter of
    the channels is a whole number of 16s, rounded up, where there are that many left."""
    if page_bits != GRADED:
        return [(int(page_bits), head_dim)]
    quarter = 16 * math.ceil(head_dim / 64)
    first = min(quarter, head_dim)
    second = min(quarter, head_dim - first)
    return [(4, first), (2, second), (0, head_dim - first - second)]


def n_sketched(page_bits: PageBits, head_dim: int) -> int:
    """Channels that have bits."""
    return sum(n for bits, n in grades(page_bits, head_dim) if bits)


def channel_bits(page_bits: PageBits, channels: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
    """(d) bits of each channel. channels: (d) the order of a graded sketch."""
    bits = np.empty(len(channels), np.int64)
    bits[channels] = np.repeat(*np.transpose(grades(page_bits, len(channels))))
    return bits


def sketch(
    pages: npt.ArrayLike, page_bits: PageBits, channels: npt.NDArray[np.uint16] | None = None
) -> Sketch:
    """Of the keys (P, 64, d) as the KV cache stores them, in f16. channels: (d), first those that have most
    bits in a graded sketch."""
    keys = np.asarray(pages).astype(np.float32)
    order = np.arange(keys.shape[2], dtype=np.uint16) if channels is None else channels
    bits = channel_bits(page_bits, order)
    top = np.float32(2) ** bits.astype(np.float32) - 1
    lo = np.where(bits > 0, keys.min(axis=1), _f16(keys.mean(axis=1)))
    spread = np.where(bits > 0, keys.max(axis=1) - lo, np.float32(0))
    step = _f16(np.divide(spread, top, where=top > 0, out=np.zeros_like(spread)))
    steps = np.broadcast_to(step[:, None], keys.shape)
    codes = np.divide(keys - lo[:, None], steps, where=steps > 0, out=np.zeros_like(keys))
    return Sketch(lo, step, np.clip(np.rint(codes), 0, top).astype(np.uint8))


def _f16(x: Floats) -> Floats:
    return x.astype(np.float16).astype(np.float32)


def page_bytes(head_dim: int, page_bits: PageBits) -> int:
    """Size of one page's sketch: lo, and the step of channels with bits, in f16, and the codes.

    Codes are two planes per grade and read page: the low two bits of four channels to a byte, then for 4 bits
    the high two likewise, for 3 bits the high one of eight channels to a byte, in whole units of 32 channels.
    """
    size = 2 * (head_dim + n_sketched(page_bits, head_dim))
    for bits, n in grades(page_bits, head_dim):
        two_bits = 16 * n
        size += {0: 0, 2: two_bits, 3: two_bits + 4 * 64 * math.ceil(n / 32), 4: 2 * two_bits}[bits]
    return size


def estimated_scores(queries: npt.ArrayLike, s: Sketch, scale: float) -> Doubles:
    """(n, 64 P) of queries (n, d), with w = scale * q * step rounded to 8 bits for each query and page."""
    scaled = np.asarray(queries).astype(np.float32) * np.float32(scale)
    weights, unit = rounded_weights(scaled[:, None] * s.step)
    base = np.einsum("nd,pd->np", scaled.astype(np.float64), s.lo)
    # (P, n, 64), of whole numbers under 2^53: exact.
    products = weights.astype(np.float64).swapaxes(0, 1) @ s.codes.astype(np.float64).swapaxes(1, 2)
    scores = base[..., None] + unit.astype(np.float64) * products.swapaxes(0, 1)
    return np.asarray(scores.reshape(len(scaled), s.codes.shape[0] * s.codes.shape[1]))


def rounded_weights(weights: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """Weights (..., d) as whole numbers, at most 127 in magnitude, times a unit (..., 1)."""
    unit = np.abs(weights).max(axis=-1, keepdims=True) / np.float32(127)
    usable = np.broadcast_to(unit >= np.finfo(np.float32).tiny, weights.shape)
    whole = np.divide(weights, unit, where=usable, out=np.zeros_like(weights))
    return np.rint(whole).astype(np.int8), unit


def shares(scores: Doubles, local_mass: Doubles) -> Doubles:
    """(n, R): the part of all attention that each read page has.

    scores: (n, 16 R), of the whole bulk. local_mass: (n), the true L of sinks and window.
    """
    total = np.logaddexp(local_mass, np.logaddexp.reduce(scores, axis=1))
    share = np.exp(scores - total[:, None]).reshape(len(scores), scores.shape[1] // READ_PAGE, READ_PAGE)
    return np.asarray(share.sum(axis=2))


def wanted(share: Doubles, cut: float, page_drop: float) -> Bools:
    """The read pages (R) of one query head whose share (R) exceeds the cut.

    It is halved until the shares it leaves out sum to at most page_drop; 1 is no bound.
    """
    least = np.float32(cut)
    if page_drop < 1:
        for _ in range(MAX_HALVINGS):
            if share[share <= least].sum() <= np.float32(page_drop):
                break
            least /= np.float32(2)
    return np.asarray(share > least)


def heads_sharing(n: int, group: int) -> int:
    """How many neighbouring heads of a group share a list of read pages, in a tile of n queries.

    All where they have few rows, as in decode: there what is read is what costs. Otherwise each head has its
    own, for what is computed is what costs, and no head has work with another's pages.
    """
    return group if n * group <= SHARED_ROWS else 1


def scored_queries(is_long: Bools) -> Bools:
    """(n): the queries of a tile whose long heads are asked, by is_long (heads, n) of the heads that share.

    Up to 16 at equal distances, counting back from the last: every fourth of a whole tile, all of a short
    one; where none of these has a long head, the last query that has one.
    """
    has_long = np.asarray(is_long.any(axis=0))
    asked = np.zeros(len(has_long), bool)
    asked[:: -math.ceil(len(asked) / SCORED_MOST)] = True
    if not (asked & has_long).any():
        asked[np.flatnonzero(has_long)[-1:]] = True
    return np.asarray(asked & has_long)


def read_pages(
    queries: npt.ArrayLike,
    is_long: Bools,
    local_mass: Doubles,
    s: Sketch,
    scale: float,
    cut: float,
    page_drop: float,
) -> tuple[Bools, Bools]:
    """What the long ones of the heads of a tile that share a list read, (R), and the queries (n) that were
    scored for it.

    queries: (heads, n, d), of the tile. is_long, local_mass: (heads, n). s: the sketch of the whole bulk.
    """
    scored = scored_queries(is_long)
    asked = is_long & scored
    share = shares(estimated_scores(np.asarray(queries)[asked], s, scale), local_mass[asked])
    reads = np.zeros(share.shape[1], bool)
    for of_head in share:
        reads |= wanted(of_head, cut, page_drop)
    return reads, scored
