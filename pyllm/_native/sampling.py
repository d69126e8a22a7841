"""Drawing a token from logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyllm._native.loading import check, library


def sample(
    logits: NDArray[np.float32], params: dict[str, float], recent: NDArray[np.int32], rng: NDArray[np.uint64]
) -> int:
    """Draws a token from logits (n_vocab,).

    params: fields of pyllm_sampling; recent: (n,) ids for the penalties; rng: (1,) its state, advanced in
    place.
    """
    ffi, lib = library()
    out = ffi.new("int32_t *")
    check(
        lib.pyllm_sample,
        ffi.from_buffer("float[]", logits),
        len(logits),
        ffi.new("pyllm_sampling *", params),
        ffi.from_buffer("int32_t[]", recent),
        len(recent),
        ffi.from_buffer("uint64_t[]", rng, True),
        out,
    )
    return int(out[0])
