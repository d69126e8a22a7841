"""What scripts/device_check times is what it says, on the emulated GPU, whose times say nothing."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

import device_stages
from emulated import check, ffi, lib

DEPTH = 1024


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"N_HEADS": 8, "N_KV_HEADS": 2, "HEAD_DIM": 32, "N_WINDOW": 64, "MATRICES_BYTES": 1 << 18}
    for name, value in sizes.items():
        monkeypatch.setattr(device_stages, name, value)


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q6_K, Type.Q8_0, Type.Q5_1], ids=lambda kind: kind.name)
def test_matrices(kind: Type) -> None:
    for n in (1, 8):
        row = device_stages.matrices(kind, (256, 512), n, repeats=2)
        n_bytes, multiplies = row["gb_s"] * row["us"] * 1e3, row["tera_multiply_adds_s"] * row["us"] * 1e6
        assert multiplies == pytest.approx(n * 256 * 512)
        assert n_bytes == pytest.approx(256 * 512 * packed_bits(kind) / 8, rel=0.001)


def packed_bits(kind: Type) -> float:
    """Of a weight, with what its scales take: the file's, but for what is padded."""
    traits = ffi.new("hook_quant_traits *")
    check(lib.hook_quant_type(kind.value, traits))
    scale = 16 / 256 + 8 / traits.group if traits.scaled else 16 / 32
    return float(traits.bits + (2 if traits.has_min else 1) * scale)


def test_attention_reads_what_is_said(rng: np.random.Generator) -> None:
    k = rng.standard_normal((DEPTH + 1, 2, 32), np.float32)
    q = 2 * rng.standard_normal((1, 8, 32), np.float32)

    def read(policy: str, share: float = 0.0, local_heads: int = 0, graded: bool = False) -> float:
        row = device_stages.attention(q, k, DEPTH, 2, policy, share, local_heads, repeats=2, graded=graded)
        assert set(row["us_per_layer"]) == set(device_stages.STAGES)
        assert min(row["us_per_layer"].values()) > 0
        return float(row["bulk_bytes_read"])

    assert read("dense") == 1
    assert read("adaptive", local_heads=4) == 0.5
    assert read("adaptive", local_heads=8) == 0
    for graded in (False, True):
        share = device_stages.share_that_reads(q, k, DEPTH, 0.4, graded)
        assert read("dense", share, graded=graded) == pytest.approx(0.4, abs=0.1)
