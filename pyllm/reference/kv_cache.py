"""What the KV cache gives back of keys and values, by its kv_type: "f16" or "q8_0"."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

KV_TYPES = ("f16", "q8_0")
KEY_GROUP = 32
"""Dimensions of a key that share a scale."""


def stored_keys(k: npt.ArrayLike, kv_type: str = "f16") -> npt.NDArray[np.float64]:
    """k: (..., d), of "q8_0" with d a multiple of 32."""
    return multiples(k, KEY_GROUP) if kv_type == "q8_0" else halves(k)


def stored_values(v: npt.ArrayLike, kv_type: str = "f16") -> npt.NDArray[np.float64]:
    """v: (..., d)."""
    return multiples(v, np.shape(v)[-1]) if kv_type == "q8_0" else halves(v)


def halves(x: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Rounded to f16."""
    return np.asarray(x).astype(np.float16).astype(np.float64)


def multiples(x: npt.ArrayLike, group: int) -> npt.NDArray[np.float64]:
    """Rounded to whole multiples, −127 to 127, of one scale, an f16, for every `group` neighbours of the last
    axis: ggml's Q8_0 where that is 32."""
    groups = np.asarray(x, np.float32).reshape(*np.shape(x)[:-1], -1, group)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    scale = (largest / np.float32(127)).astype(np.float16).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, where=scale > 0, out=np.zeros_like(scale))
    codes = np.clip(np.rint(groups * inverse), -127, 127)
    return np.asarray(codes.astype(np.float64) * scale).reshape(np.shape(x))


def token_bytes(kv_type: str, head_dim: int) -> int:
    """Of one token's key and value."""
    return 2 * head_dim + 2 * (head_dim // KEY_GROUP) + 2 if kv_type == "q8_0" else 4 * head_dim
