"""What attention decided and why, token by token: filled by `Session.eval`."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from pyllm.errors import ArgumentError

Masses = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Record:
    """Of the n tokens of one evaluation.

    Masses are (n_layers, n, n_heads) float32: natural logs of the sum of the exponentiated scores, NaN where
    there is none. Recording changes no decision and no logit.

    audit: (n,) bool, the tokens whose true masses are wanted. local_mass: L, over sinks and window. estimate:
    of M as the policy makes one: adaptive's, or the oracle's true mass. true_mass: M, over the bulk of
    audited tokens. read_mass: over everything that was read. mean_score, deviation: c·q·μ and s, of the
    bulk's scores by the moments that adaptive takes, shaped as masses. is_long: (n_layers, n, n_heads) bool,
    False without a bulk. queries: (n_layers, n, n_heads, head_dim), after RoPE and not scaled; None where
    they are not wanted.
    """

    audit: NDArray[np.bool_]
    local_mass: Masses
    estimate: Masses
    true_mass: Masses
    read_mass: Masses
    mean_score: Masses
    deviation: Masses
    is_long: NDArray[np.bool_]
    queries: NDArray[np.float32] | None = None

    @classmethod
    def empty(cls, n_layers: int, n_heads: int, audit: NDArray[np.bool_], head_dim: int = 0) -> Record:
        """One to be filled: NaN and False. audit: (n,). head_dim: of the queries, 0 without them. Raises
        ArgumentError for another shape."""
        audit = np.asarray(audit, bool)
        if audit.ndim != 1:
            raise ArgumentError(f"audit: expected one truth value per token, got shape {audit.shape}")
        shape = (n_layers, len(audit), n_heads)
        nothing = np.full((6, *shape), np.nan, np.float32)
        local, estimate, true, read, mean_score, deviation = nothing
        queries = np.full((*shape, head_dim), np.nan, np.float32) if head_dim else None
        return cls(audit, local, estimate, true, read, mean_score, deviation, np.zeros(shape, bool), queries)

    def __len__(self) -> int:
        return len(self.audit)

    def part(self, first: int, stop: int) -> Record:
        """An empty one for tokens [first, stop) of this one, contiguous; `put` brings it back."""
        n_layers, _, n_heads = self.is_long.shape
        head_dim = 0 if self.queries is None else self.queries.shape[3]
        return Record.empty(n_layers, n_heads, self.audit[first:stop].copy(), head_dim)

    def put(self, first: int, part: Record) -> None:
        """Takes over what part holds, as tokens from `first` on."""
        for name in (f.name for f in fields(self) if f.name != "audit"):
            if getattr(self, name) is not None:
                getattr(self, name)[:, first : first + len(part)] = getattr(part, name)

    @property
    def lost_share(self) -> Masses:
        """True share of attention that was not read, (n_layers, n, n_heads), NaN without a true mass:
        1 − exp(read_mass − logaddexp(local_mass, true_mass)), at least 0."""
        with np.errstate(invalid="ignore"):
            whole = np.logaddexp(self.local_mass, self.true_mass)
        return np.maximum(-np.expm1(self.read_mass - whole), 0)
