"""A KV cache of bytes (kv_type="q8_0"): its rounding, pages on it, sessions and their files, refusals.

That attention over it agrees with numpy and does not depend on batches and threads is in test_attention.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyllm import LLM, ArgumentError, Dense, FormatError, UnsupportedError
from pyllm.cli import main
from pyllm.evaluate.metrics import Reference
from pyllm.reference.attention import Policy
from pyllm.reference.kv_cache import KEY_GROUP, multiples, stored_keys, stored_values, token_bytes
from test_attention import ISAS, SEEDS, Inputs, random_inputs, run, with_arrays
from test_pages import check_reference, paged
from tiny_models import write_tiny

shapes = st.sampled_from([(1, 1, 32), (6, 2, 64), (7, 1, 96), (4, 4, 128)])


class TestRounding:
    @settings(deadline=None)
    @given(seed=SEEDS, exponent=st.integers(-40, 20))
    def test_is_within_half_a_step(self, seed: int, exponent: int) -> None:
        x = np.random.default_rng(seed).standard_normal((5, 96)) * 2.0**exponent
        for rounded, group in ((stored_keys(x, "q8_0"), KEY_GROUP), (stored_values(x, "q8_0"), 96)):
            step = np.abs(x).reshape(5, -1, group).max(2) / 127
            # The scale is a half: off by 2^-11 of itself, or a step of the smallest halves.
            most = (0.5 + 127 * 2.0**-11) * step + 64 * 2.0**-24
            assert (np.abs(rounded - x).reshape(5, -1, group) <= most[..., None]).all()

    def test_of_nothing_is_nothing(self) -> None:
        assert not multiples(np.zeros((2, 64)), 32).any()

    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("factor", [0.0, 1e-7, 1e-4, 1e4])
    def test_small_and_large(self, isa: str, factor: float) -> None:
        """One token looks at itself alone, so that what comes back is its value as it is stored."""
        x = random_inputs(11, 1, 6, 2, 64)
        v = np.ascontiguousarray(x.v * np.float32(factor))
        output = run(Inputs(x.q, x.k, v), Policy("dense"), isa, kv_type="q8_0").output
        expected = stored_values(v, "q8_0").repeat(3, axis=1)
        assert np.allclose(output, expected, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 9e6])
def test_what_bytes_cannot_hold_shows_at_once(isa: str, part: str, bad: float) -> None:
    """9e6 is more than 127 times the largest half."""
    x = random_inputs(6, 200, 4, 2, 64)
    spoilt = getattr(x, part).copy()
    spoilt[150, 1, 3] = bad
    arrays: dict[str, NDArray[np.float32]] = {"q": x.q, "k": x.k, "v": x.v, part: spoilt}
    output = run_unchecked(Inputs(**arrays), isa)
    assert np.isfinite(output[:, :2]).all()
    assert np.isfinite(output[:128]).all()
    assert np.isnan(output[150:, 2:]).all()


def run_unchecked(x: Inputs, isa: str) -> NDArray[np.float32]:
    """`run` of keys and values that are not finite, 64 tokens at once: they spoil the panels of theirs."""
    return run(x, Policy("dense", n_window=64), isa, chunk=64, kv_type="q8_0", finite=False).output


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25, deadline=None)
@given(
    seed=SEEDS, shape=shapes, policy=paged, n=st.integers(100, 600), chunk=st.sampled_from([1, 7, 64, 512])
)
def test_pages(isa: str, seed: int, shape: tuple[int, int, int], policy: Policy, n: int, chunk: int) -> None:
    x = random_inputs(seed, n if chunk > 1 else min(n, 250), *shape)
    check_reference(x, with_arrays(policy, shape, seed), isa, chunk, kv_type="q8_0")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("bytes") / "tiny.gguf", tokenizer=True, sharp=4.0)


TOKENS = np.random.default_rng(8).integers(0, 300, 400).tolist()


def opened(path: Path, kv_type: str = "q8_0", **options: Any) -> LLM:
    return LLM(path, device="cpu", kv_type=kv_type, attention=Dense(window=64), n_ctx=512, **options)


def test_a_session_may_have_another_kind_than_its_model(path: Path) -> None:
    expected = opened(path, "f16").session().eval(TOKENS)
    assert np.array_equal(opened(path).session(kv_type="f16").eval(TOKENS), expected)
    assert not np.array_equal(opened(path).session().eval(TOKENS), expected)
    with pytest.raises(ArgumentError, match="kv_type"):
        opened(path).session(kv_type="q8")


def test_batches_change_nothing(path: Path) -> None:
    whole = opened(path).session().eval(TOKENS, all_logits=True)
    by_one = opened(path).session()
    assert np.array_equal(whole, [by_one.eval([token]) for token in TOKENS])


def test_rewinding_leaves_nothing(path: Path) -> None:
    session = opened(path).session()
    expected = session.eval(TOKENS)
    session.rewind(77)
    session.eval(TOKENS[:200])
    session.rewind(77)
    assert np.array_equal(session.eval(TOKENS[77:]), expected)


def test_memory_is_what_tokens_take(path: Path) -> None:
    info = opened(path).info
    for kv_type in ("f16", "q8_0"):
        llm = opened(path, kv_type)
        per_token = (llm.kv_bytes(512) - llm.kv_bytes(256)) / 256
        assert per_token == info.n_layers * info.n_kv_heads * token_bytes(kv_type, info.head_dim)


def test_a_saved_session_has_its_kind(path: Path, tmp_path: Path) -> None:
    session = opened(path).session()
    session.eval(TOKENS)
    session.save(tmp_path / "bytes")
    other = opened(path).session()
    other.load(tmp_path / "bytes")
    assert np.array_equal(other.eval([7]), session.eval([7]))
    halves = opened(path, "f16").session()
    with pytest.raises(FormatError, match="kv_type q8_0, this one's is f16"):
        halves.load(tmp_path / "bytes")
    halves.eval(TOKENS[:5])  # goes on as it was
    assert (tmp_path / "bytes").stat().st_size < 0.6 * halves_size(path, tmp_path)


def halves_size(path: Path, folder: Path) -> int:
    session = opened(path, "f16").session()
    session.eval(TOKENS)
    session.save(folder / "halves")
    return (folder / "halves").stat().st_size


def with_key_bias(path: Path, bias: float) -> Path:
    """A tiny model whose second layer has this one for one dimension of each head's keys."""
    write_tiny(path, "qwen2", sharp=4.0, tokenizer=True)
    tensors = {t.name: t for t in GGUFReader(path, "r+").tensors}
    tensors["blk.1.attn_k.bias"].data[3::32] = bias
    return path


def loss_of_bytes(path: Path) -> float:
    halves, quantized = (opened(path, kv).session().eval(TOKENS, all_logits=True) for kv in ("f16", "q8_0"))
    return float(np.abs(halves - quantized).mean())


def test_layers_of_large_key_biases_have_halves(tmp_path: Path) -> None:
    below, above = (with_key_bias(tmp_path / f"{bias}.gguf", bias) for bias in (31.9, -32.1))
    assert loss_of_bytes(above) < loss_of_bytes(below) / 2
    for path, kinds in ((below, ("q8_0", "q8_0")), (above, ("q8_0", "f16"))):
        llm = opened(path)
        per_token = (llm.kv_bytes(512) - llm.kv_bytes(256)) / 256
        assert per_token == sum(2 * token_bytes(kind, 32) for kind in kinds)


def test_a_saved_session_of_both_kinds(tmp_path: Path) -> None:
    path = with_key_bias(tmp_path / "wide.gguf", 200.0)
    session, other = opened(path).session(), opened(path).session()
    session.eval(TOKENS)
    session.save(tmp_path / "saved")
    other.load(tmp_path / "saved")
    assert np.array_equal(other.eval([7]), session.eval([7]))
    session.rewind(77)
    assert np.array_equal(session.eval(TOKENS[77:]), opened(path).session().eval(TOKENS))


def test_refusals(path: Path, tmp_path: Path, emulated_gpu: None) -> None:
    for bad in ("q4_0", "F16", 1, None):
        with pytest.raises(ArgumentError, match="kv_type: expected 'f16' or 'q8_0', got"):
            opened(path, bad)  # type: ignore[arg-type]
    odd = write_tiny(tmp_path / "odd.gguf", head_dim=80, dim=640, tokenizer=True)
    with pytest.raises(
        UnsupportedError, match="kv_type q8_0: heads of 80 dimensions, expected a multiple of 32"
    ):
        opened(odd).session()
    with pytest.raises(UnsupportedError, match="kv_type q8_0: on the GPU keys and values are f16"):
        LLM(path, device="cuda", kv_type="q8_0").session()
    assert LLM(path, kv_type="q8_0").device == "cpu"
    assert LLM(path).device == "cuda"


def test_loses_little(default_model: Path) -> None:
    """Of the real model: a sixth of what `balanced` may lose."""
    text = LLM(default_model, device="cpu", n_ctx=512)
    ids = text.tokenize(Path(__file__).read_text(encoding="utf-8"))[:400]
    halves, quantized = (
        LLM(default_model, device="cpu", kv_type=kv_type, attention="dense", n_ctx=512)
        .session()
        .eval(ids, all_logits=True)
        for kv_type in ("f16", "q8_0")
    )
    scores = Reference(halves, np.array([*ids[1:], 0])).compare(quantized)
    assert 0 < scores.kl.mean() < 0.002


def test_command(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-m", str(path), "--max-tokens", "5", "--temperature", "0", "--kv-type", "q8_0", "Hello"]
    assert main(["generate", *arguments]) == 0
    assert capsys.readouterr().out
