"""What is measured: prompt sizes, depths, how often, and with which tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pyllm.errors import ArgumentError


@dataclass(frozen=True)
class Plan:
    """prefill: tokens of a prompt, each into an empty context. depths: tokens in the context when `decode`
    tokens are evaluated one by one. runs: measurements of each. seed: of the random tokens."""

    prefill: tuple[int, ...] = (512, 2048, 8000)
    depths: tuple[int, ...] = (0, 2000, 8000)
    decode: int = 64
    runs: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        lowest = {"prefill": 1, "depths": 0, "decode": 1, "runs": 1, "seed": 0}
        for name, low in lowest.items():
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number < low:
                    raise ArgumentError(f"{name}: expected at least {low}, got {number}")
        if not self.prefill and not self.depths:
            raise ArgumentError("neither a prefill size nor a depth to measure")

    @property
    def n_ctx(self) -> int:
        """Tokens of context that it takes."""
        return max([*self.prefill, *(depth + self.decode for depth in self.depths)])

    def fitting(self, n_ctx: int) -> Plan:
        """What of it a context of n_ctx tokens holds. Raises ArgumentError where that is nothing."""
        prefill = tuple(n for n in self.prefill if n <= n_ctx)
        depths = tuple(depth for depth in self.depths if depth + self.decode <= n_ctx)
        if not prefill and not depths:
            raise ArgumentError(f"none of the sizes fits into the model's context of {n_ctx} tokens")
        return replace(self, prefill=prefill, depths=depths)

    def ids(self, n_vocab: int) -> NDArray[np.int32]:
        """Random token ids (n_ctx,): every measurement evaluates a stretch of them, at its own position."""
        return np.random.default_rng(self.seed).integers(0, n_vocab, self.n_ctx, dtype=np.int32)
