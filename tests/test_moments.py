"""Running key moments of the native library against numpy's mean and covariance, at every page boundary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulated import ffi, lib
from native import check
from test_attention import floats
from test_linear import ISAS, SEEDS

PAGE = 64


@pytest.mark.parametrize(("device", "isa"), [*(("cpu", isa) for isa in ISAS), ("cuda", ISAS[-1])])
@settings(max_examples=15, deadline=None)
@given(
    seed=SEEDS,
    n_pages=st.integers(1, 12),
    head_dim=st.sampled_from([32, 64, 80, 96, 128, 256]),
    offset=st.sampled_from([0.0, 3.0, 100.0]),
)
def test_mean_and_covariance(
    device: str, isa: str, seed: int, n_pages: int, head_dim: int, offset: float
) -> None:
    rng = np.random.default_rng(seed)
    drift = np.cumsum(rng.standard_normal((n_pages * PAGE, head_dim)), 0) * 0.1
    keys = (rng.standard_normal(drift.shape) + drift + offset).astype(np.float32)
    mean = np.full((n_pages, head_dim), np.nan, np.float32)
    cov = np.full((n_pages, head_dim, head_dim), np.nan, np.float32)
    err = ffi.new("pyllm_error *")
    check(
        lib.hook_moments(
            device.encode(), isa.encode(), floats(keys), n_pages, head_dim, floats(mean), floats(cov), err
        ),
        err,
    )
    stored = keys.astype(np.float16).astype(np.float64)
    for page in range(n_pages):
        seen = stored[: (page + 1) * PAGE]
        deviation = seen.std(0)
        assert np.allclose(mean[page], seen.mean(0), rtol=2e-6, atol=2e-6)
        scale = np.outer(deviation, deviation) + 1e-6 * (1 + offset)
        assert (np.abs(cov[page] - np.cov(seen.T, ddof=0)) <= 2e-5 * scale).all()
