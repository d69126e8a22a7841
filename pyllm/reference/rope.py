"""Rotary position embedding: frequencies with their scaling, and the rotation, as llama.cpp defines them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class RopeConfig:
    """kind: which values form a pair, "norm" (2i, 2i + 1) or "neox" (i, i + n_rot/2).

    n_rot: leading values of a head that are rotated. scaling: "none", "linear" or "yarn".
    freq_factors: (n_rot / 2) float64 that divide the frequencies (Llama 3's long-context scaling).
    """

    kind: str
    n_rot: int
    base: float
    scaling: str = "none"
    factor: float = 1.0
    original_context: int = 0
    attn_factor: float = 1.0
    ext_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    freq_factors: npt.NDArray[np.float64] | None = None


def frequencies(rope: RopeConfig) -> npt.NDArray[np.float64]:
    """(n_rot / 2) float64, radians per position: base^(−2i / n_rot), scaled."""
    unscaled = rope.base ** (-2.0 * np.arange(rope.n_rot // 2) / rope.n_rot)
    if rope.freq_factors is not None:
        unscaled = unscaled / rope.freq_factors
    if rope.scaling == "none":
        return unscaled
    interpolated = unscaled / rope.factor
    if rope.scaling == "linear":
        return interpolated
    mix = yarn_ramp(rope) * rope.ext_factor
    return interpolated * (1.0 - mix) + unscaled * mix


def yarn_ramp(rope: RopeConfig) -> npt.NDArray[np.float64]:
    """(n_rot / 2) float64: 1 where a frequency stays, 0 where it is interpolated (YaRN, arXiv 2309.00071).

    A pair stays if it turns more than beta_fast times within the original context, and is interpolated if it
    turns less than beta_slow times.
    """

    def pair_that_turns(times: float) -> float:
        turns_per_radian = rope.original_context / (times * 2.0 * math.pi)
        return rope.n_rot * math.log(turns_per_radian) / (2.0 * math.log(rope.base))

    low = max(0.0, math.floor(pair_that_turns(rope.beta_fast)))
    high = min(rope.n_rot - 1.0, math.ceil(pair_that_turns(rope.beta_slow)))
    position = (np.arange(rope.n_rot // 2) - low) / max(0.001, high - low)
    return np.asarray(1.0 - np.clip(position, 0.0, 1.0))


def magnitude(rope: RopeConfig) -> float:
    """Factor on rotated queries and keys: YaRN sharpens attention by 1 + 0.1 ln(factor) on each."""
    if rope.scaling == "yarn" and rope.ext_factor != 0.0:
        return rope.attn_factor * (1.0 + 0.1 * math.log(rope.factor))
    return rope.attn_factor


def rotate(
    x: npt.NDArray[np.float32], positions: npt.NDArray[np.int64], rope: RopeConfig
) -> npt.NDArray[np.float32]:
    """x: (T, heads, head_dim) float32, positions: (T). Angles in float64, their cosine and sine float32."""
    angles = positions[:, None] * frequencies(rope)
    cos = (np.cos(angles) * magnitude(rope)).astype(np.float32)[:, None]
    sin = (np.sin(angles) * magnitude(rope)).astype(np.float32)[:, None]
    if rope.kind == "norm":
        first, second = slice(0, rope.n_rot, 2), slice(1, rope.n_rot, 2)
    else:
        first, second = slice(0, rope.n_rot // 2), slice(rope.n_rot // 2, rope.n_rot)
    out: npt.NDArray[np.float32] = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out
