"""Activations of 8 bits (activation_bits=8) in whole models: who takes them, batches, refusals, loss.

Their rounding and their products are in test_linear.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from pyllm import LLM, ArgumentError, Dense, UnsupportedError
from pyllm._native import NativeSession, SessionParams
from pyllm.cli import main
from pyllm.evaluate.metrics import Reference
from pyllm.evaluate.texts import Text
from pyllm.evaluate.tradeoff import side_by_side
from pyllm.reference import model as reference
from pyllm.reference import weights
from pyllm.reference.attention import Policy
from test_linear import ISAS, products
from tiny_models import write_tiny

TOKENS = np.random.default_rng(8).integers(0, 300, 200).tolist()
# What a model has beside weights that take 8 bits: nothing; those that do not, or floats, on either side of
# the pair that shares its input.
MIXES: dict[str, dict[str, Type]] = {
    "all": {"*": Type.Q4_1},
    "k": {"ffn_down": Type.Q6_K, "*": Type.Q4_K},
    "down": {"ffn_down": Type.Q8_0, "*": Type.Q6_K},
    "gate": {"ffn_gate": Type.Q8_0, "*": Type.Q5_0},
    "up": {"ffn_up": Type.IQ4_XS, "attn_output": Type.F16, "*": Type.Q3_K},
    "float gate": {"ffn_gate": Type.F16, "*": Type.Q5_1},
}


def tiny(folder: Path, types: Type | dict[str, Type] = Type.Q4_1, **options: Any) -> Path:
    return write_tiny(folder / "tiny.gguf", tokenizer=True, sharp=4.0, types=types, **options)


def opened(path: Path, bits: int = 8, **options: Any) -> LLM:
    return LLM(path, device="cpu", activation_bits=bits, attention=Dense(window=64), n_ctx=512, **options)


def logits(llm: LLM) -> NDArray[np.float32]:
    return llm.session().eval(TOKENS, all_logits=True)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if products(isa) == "float"])
@pytest.mark.parametrize("mix", MIXES)
def test_the_reference_rounds_the_same_inputs(tmp_path: Path, isa: str, mix: str) -> None:
    """Float noise flips roundings in some tokens; in more than one layer these would reach all later ones."""
    path = tiny(tmp_path, MIXES[mix], n_layers=1)
    ours = logits(opened(path, isa=isa))
    model, policy = weights.load(path), Policy("dense", n_window=64)
    narrow, wide = (
        np.abs(ours - reference.forward(model, TOKENS, policy, activation_bits=bits).logits).max(1)
        for bits in (8, 16)
    )
    assert np.median(narrow) < wide.min() / 5


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0, Type.IQ4_NL, Type.IQ4_XS])
def test_other_formats_are_not_touched(tmp_path: Path, kind: Type) -> None:
    path = tiny(tmp_path, kind)
    assert np.array_equal(logits(opened(path, 8)), logits(opened(path, 16)))


def test_queries_keys_values_and_logits_have_16_bits(tmp_path: Path) -> None:
    types = dict.fromkeys(("attn_output", "ffn_gate", "ffn_up", "ffn_down"), Type.Q8_0) | {"*": Type.Q4_1}
    path = tiny(tmp_path, types, tied=False)
    assert np.array_equal(logits(opened(path, 8)), logits(opened(path, 16)))


@pytest.mark.parametrize("mix", MIXES)
def test_batches_and_threads_change_nothing(tmp_path: Path, mix: str) -> None:
    path = tiny(tmp_path, MIXES[mix])
    whole = logits(opened(path))
    by_one = opened(path).session()
    assert np.array_equal(whole, [by_one.eval([token]) for token in TOKENS])
    assert np.array_equal(whole, logits(opened(path, n_batch=33, n_threads=3)))


def test_a_session_may_have_others_than_its_model(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    llm, expected = opened(path), logits(opened(path, 16))
    session = llm.session(activation_bits=16)
    assert np.array_equal(session.eval(TOKENS, all_logits=True), expected)
    assert not np.array_equal(logits(llm), expected)
    session.save(tmp_path / "saved")
    other = llm.session()
    other.load(tmp_path / "saved")
    assert other.eval([7]).shape == session.eval([7]).shape


def test_refusals(tmp_path: Path, emulated_gpu: None) -> None:
    path = tiny(tmp_path)
    for bad in (4, 0, True, "8", 8.0, None):
        with pytest.raises(ArgumentError, match=r"activation_bits: expected 16 or 8, got"):
            LLM(path, activation_bits=bad)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="activation_bits is 12, expected 16 or 8"):
        NativeSession(opened(path)._model, SessionParams(64, 64, 16, activation_bits=12))
    with pytest.raises(UnsupportedError, match="activation_bits 8: on the GPU activations are rounded to 16"):
        LLM(path, device="cuda", activation_bits=8).session()
    assert LLM(path, activation_bits=8).device == "cpu"
    assert LLM(path).device == "cuda"


def test_loses_little(default_model: Path) -> None:
    """Of the real model: what docs/performance.md says of it, on another text."""
    wide, narrow = (
        LLM(default_model, device="cpu", activation_bits=bits, attention="dense", n_ctx=512)
        for bits in (16, 8)
    )
    ids = wide.tokenize(Path(__file__).read_text(encoding="utf-8"))[:400]
    exact, rounded = (llm.session().eval(ids, all_logits=True) for llm in (wide, narrow))
    scores = Reference(exact, np.array([*ids[1:], 0])).compare(rounded)
    assert 0 < scores.kl.mean() < 0.002


def test_evaluation_compares_with_16_bits(tmp_path: Path) -> None:
    llm = opened(tiny(tmp_path))
    _, (dense,) = side_by_side(llm, Text("noise", np.array(TOKENS, np.int32)), [Dense(window=64)], n_decode=4)
    for scores in dense.scores:
        assert np.concatenate([part.kl for part in scores]).mean() > 0


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "-m",
        str(tiny(tmp_path)),
        "--max-tokens",
        "5",
        "--temperature",
        "0",
        "--activation-bits",
        "8",
    ]
    assert main(["generate", *arguments, "Hello"]) == 0
    assert capsys.readouterr().out
