"""What stands for the pages that a token, evaluated alone, does not read: the rest of the page tier.

One value per page: the mean of its values, weighed as the usual query weighs them, the mean of the queries on
other text. It counts as much as the sketch says that those read pages of the page hold which are left out,
times a factor, for the mean of exponentials of rounded scores is too large. Plain means would be worse than
nothing: in every page there are tokens that all queries look at and that say little.

Axes: G key/value heads, H query heads, P pages, R = 4 P read pages, d = head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .sketch import READ_PAGE, Bools, Doubles, Floats, Sketch, estimated_scores

STRIPS = 4  # read pages of a page


def usual_values(
    keys: npt.ArrayLike, values: npt.ArrayLike, query: npt.NDArray[np.float32], scale: float
) -> Floats:
    """(P, d), values of f16. keys, values: (P, 64, d), as the KV cache stores them. query: (d), the usual
    one."""
    scores = np.asarray(keys, np.float64) @ (np.float64(scale) * query)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    means = np.einsum("pt,ptd->pd", weights, np.asarray(values, np.float64))
    return np.asarray(means / weights.sum(axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def weights_left_out(scores: Doubles, local_mass: Doubles, reads: Bools) -> Doubles:
    """(n, P): estimated weights of the read pages that are not read, that of sinks and window being 1.

    scores: (n, 16 R), of the whole bulk. local_mass: (n). reads: (n, R).
    """
    weights = np.exp(scores - local_mass[:, None]).reshape(*reads.shape, READ_PAGE).sum(axis=2)
    return np.asarray(np.where(reads, 0, weights).reshape(len(reads), -1, STRIPS).sum(axis=2))


@dataclass(frozen=True)
class Rest:
    """mass: (G, H/G), the natural logarithm of its weight; −inf where there is none. value: (G, H/G, d), its
    mean."""

    mass: Doubles
    value: Doubles

    @classmethod
    def of(
        cls,
        queries: Doubles,
        is_long: Bools,
        reads: Bools,
        local_mass: Doubles,
        sketches: list[Sketch],
        usual: list[Floats],
        scale: float,
        factor: float,
    ) -> Rest:
        """Of one token: queries (G, H/G, d), is_long and local_mass (G, H/G), reads (G, H/G, R). Sketches and
        usual values (G) are of the whole bulk or more."""
        mass, value = np.full(queries.shape[:2], -np.inf), np.zeros(queries.shape)
        n_pages = reads.shape[2] // STRIPS
        for g, of_head in enumerate(sketches):
            scores = estimated_scores(queries[g], of_head.first(n_pages), scale)
            weights = weights_left_out(scores, local_mass[g], reads[g])
            total = weights.sum(axis=1)
            some = is_long[g] & (total > 0)
            mass[g, some] = local_mass[g, some] + np.log(np.float32(factor) * total[some])
            value[g, some] = weights[some] @ usual[g][:n_pages].astype(np.float64) / total[some, None]
        return cls(mass, value)

    def joined(self, attended: Doubles, mass: Doubles) -> Doubles:
        """With what was read: attended (G, H/G, d), the softmax over it, and its mass (G, H/G)."""
        total = np.logaddexp(mass, self.mass)
        read, left = (np.exp(x - total)[..., None] for x in (mass, self.mass))
        return np.asarray(read * attended + left * self.value)
