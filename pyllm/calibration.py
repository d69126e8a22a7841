"""What the adaptive rule can know of a model beforehand: a regression per head, and moments of its keys."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyllm.errors import ArgumentError

MOMENTS = ("prompt", "calibrated")


@dataclass(frozen=True, eq=False)
class Calibration:
    """A value: it compares and hashes by its contents, and its arrays are read-only float32.

    coefficients: (n_layers, n_heads, 3), b0, b1 and b2 of M̂ = ln N + c·q·μ + b0 + b1 s² + b2 s. means:
    (n_layers, n_kv_heads, head_dim) and covariances: (n_layers, n_kv_heads, head_dim, head_dim), ddof 0, of
    keys as stored, RoPE applied. page_variances: (n_layers, n_kv_heads, head_dim), the mean variance of these
    keys inside a page. query_squares and query_means: likewise, mean squares and means of the queries that
    read them, RoPE applied. positions: [first, stop) of the keys that these moments stand for. moments:
    "prompt" or "calibrated", those whose μ and s the coefficients were fitted with. model: the fingerprint of
    the model that it was fitted to, where that is known: no other takes it. Raises ArgumentError for shapes
    that do not belong together, and for what is not finite.
    """

    coefficients: NDArray[np.float32]
    means: NDArray[np.float32]
    covariances: NDArray[np.float32]
    page_variances: NDArray[np.float32]
    query_squares: NDArray[np.float32]
    query_means: NDArray[np.float32]
    positions: tuple[int, int]
    moments: str = "prompt"
    model: str | None = None
    digest: str = field(init=False, repr=False)

    def __init__(
        self,
        coefficients: ArrayLike,
        means: ArrayLike,
        covariances: ArrayLike,
        page_variances: ArrayLike,
        query_squares: ArrayLike,
        query_means: ArrayLike,
        positions: tuple[int, int],
        moments: str = "prompt",
        model: str | None = None,
    ) -> None:
        b, mean, cov = map(_constant, (coefficients, means, covariances))
        inside, squares, queries = map(_constant, (page_variances, query_squares, query_means))
        shapes = b.shape, mean.shape, cov.shape, inside.shape, squares.shape, queries.shape
        if b.ndim != 3 or mean.ndim != 3 or b.shape[2] != 3 or len(b) != len(mean) or not b.size * mean.size:
            raise ArgumentError(
                f"calibration: coefficients of shape {shapes[0]} and means of shape {shapes[1]}, expected "
                f"(n_layers, n_heads, 3) and (n_layers, n_kv_heads, head_dim)"
            )
        per_channel = inside.shape == squares.shape == queries.shape == mean.shape
        belong = per_channel and cov.shape == (*mean.shape, mean.shape[2])
        if not belong or b.shape[1] % mean.shape[1]:
            raise ArgumentError(f"calibration: arrays of shapes {shapes} do not belong to one model")
        arrays = {
            "coefficients": b,
            "means": mean,
            "covariances": cov,
            "page_variances": inside,
            "query_squares": squares,
            "query_means": queries,
        }
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise ArgumentError(f"calibration: {name} hold NaN or infinity")
        first, stop = (int(position) for position in positions)
        if not 0 <= first < stop:
            raise ArgumentError(f"calibration: positions [{first}, {stop}) are no range")
        if moments not in MOMENTS:
            raise ArgumentError(f"calibration: moments are {moments!r}, expected one of {MOMENTS}")
        # Of the numbers alone: what is computed with them is the same whoever they belong to.
        digest = hashlib.sha256(f"{shapes} {first} {stop} {moments}".encode())
        for array in arrays.values():
            digest.update(array.tobytes())
        values = (*arrays.values(), (first, stop), moments, model, digest.hexdigest())
        for name, value in zip(self.__dataclass_fields__, values, strict=True):
            object.__setattr__(self, name, value)

    @property
    def channels(self) -> NDArray[np.uint16]:
        """(n_layers, n_kv_heads, head_dim): the channels of each head, first those that move scores most.

        A score is a sum over channels of q_i k_i, of which the part of channel i varies from key to key by
        q_i² times the variance of its keys: of those of a page, for a sketch has every page's own level.
        """
        moved = self.query_squares * self.page_variances
        return np.argsort(-moved, axis=2, kind="stable").astype(np.uint16)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calibration) and (self.digest, self.model) == (other.digest, other.model)

    def __hash__(self) -> int:
        return hash(self.digest)


def _constant(values: ArrayLike) -> NDArray[np.float32]:
    """A copy that nobody can change."""
    array = np.array(values, np.float32, order="C")
    array.flags.writeable = False
    return array
