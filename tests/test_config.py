"""What a model says about itself: refused, or taken as it is meant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from pyllm import _native
from pyllm.errors import FormatError, UnsupportedError
from pyllm.reference import weights
from tiny_models import RopeScaling, write_tiny

CLEAR_SCREEN = b"\x1b[2J"


def open_model(path: Path) -> _native.Model:
    return _native.Model(_native.File([path]), 1)


def patched(path: Path, old: bytes, new: bytes) -> Path:
    """The first `old` becomes `new`, of as many bytes."""
    assert len(old) == len(new)
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"llama", CLEAR_SCREEN + b"x", r"architecture '\\x1b\[2Jx' is not supported; supported: llama"),
        (b"yarn", CLEAR_SCREEN, r"key llama\.rope\.scaling\.type is '\\x1b\[2J'; supported: none, linear"),
    ],
)
def test_what_a_file_says_does_not_reach_the_terminal_raw(
    tmp_path: Path, old: bytes, new: bytes, message: str
) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", rope_scaling=RopeScaling("yarn", 4.0, original_context=128))
    with pytest.raises(UnsupportedError, match=message) as failure:
        open_model(patched(path, old, new))
    assert str(failure.value).isprintable()


# ---- its tensors ----


def test_a_tensor_that_nothing_would_multiply_with_is_refused(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", biases=True)
    open_model(path)
    patched(path, b"blk.1.ffn_gate.bias", b"blk.1.ffn_gate.bies")
    for opened in (open_model, lambda path: _native.Model.memory(_native.File([path]))):
        with pytest.raises(UnsupportedError, match=r"tensor 'blk\.1\.ffn_gate\.bies' has no place"):
            opened(path)


# ---- its RoPE ----


def logits_of(path: Path) -> np.ndarray:
    logits = np.empty((1, 320), np.float32)
    session = _native.NativeSession(open_model(path), _native.SessionParams(64, 64, 16))
    session.eval(np.arange(50, dtype=np.int32), logits)
    return logits


def test_a_factor_by_its_old_name(tmp_path: Path) -> None:
    """What both names say, the new one does; 0 means none."""
    paths = [
        write_tiny(tmp_path / f"{i}.gguf", sharp=8, floats=floats)
        for i, floats in enumerate(
            (
                {},
                {"rope.scaling.factor": 0.0},
                {"rope.scaling.factor": 4.0},
                {"rope.scale_linear": 4.0},
                {"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0},
            )
        )
    ]
    none, zero, factor, old, both = map(logits_of, paths)
    assert np.array_equal(none, zero)
    assert not np.array_equal(none, factor)
    assert np.array_equal(factor, old)
    assert np.array_equal(factor, both)
    assert weights.load(paths[3]).config.rope == weights.load(paths[2]).config.rope


def test_attention_factors_multiply(tmp_path: Path) -> None:
    """As llama.cpp has it: the factor of a scaling and that of YaRN are two."""
    one, other = (
        write_tiny(tmp_path / f"{len(floats)}.gguf", sharp=8, floats=floats)
        for floats in (
            {"rope.scaling.attn_factor": 0.75},
            {"rope.scaling.attn_factor": 1.5, "rope.scaling.yarn_attn_factor": 0.5},
        )
    )
    assert np.array_equal(logits_of(one), logits_of(other))


# ---- its memory ----


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Type.F16, Type.Q8_0])
def test_memory_is_what_is_held(tmp_path: Path, tied: bool, kind: Type) -> None:
    """Of an embedding table with an output matrix beside it nothing, as of tensors that nothing binds."""
    path = write_tiny(tmp_path / "tiny.gguf", "qwen2", types=kind, tied=tied, rope_freqs=np.ones(16))
    assert _native.Model.memory(_native.File([path])) == open_model(path).info.resident_bytes
    patched(path, b"blk.1.ffn_norm.weight", b"blk.2.ffn_norm.weight")
    with pytest.raises(FormatError, match=r"tensor blk\.1\.ffn_norm\.weight is missing"):
        _native.Model.memory(_native.File([path]))


# ---- its attention ----


def test_a_context_past_the_sliding_window_is_refused(tmp_path: Path) -> None:
    """Up to its end the window changes nothing."""
    narrow = write_tiny(tmp_path / "narrow.gguf", n_ctx_train=128, sliding_window=127)
    with pytest.raises(UnsupportedError, match=r"key llama\.attention\.sliding_window is 127: .*not supp"):
        open_model(narrow)
    for window in (128, 200):
        model = open_model(write_tiny(tmp_path / "wide.gguf", n_ctx_train=128, sliding_window=window))
        _native.NativeSession(model, _native.SessionParams(window, 64, 16))
        with pytest.raises(UnsupportedError, match=f"{window + 1} tokens is longer .* window of {window}"):
            _native.NativeSession(model, _native.SessionParams(window + 1, 64, 16))
    none = open_model(write_tiny(tmp_path / "none.gguf", n_ctx_train=128, sliding_window=0))
    _native.NativeSession(none, _native.SessionParams(500, 64, 16))


def test_a_scale_of_zero_is_the_usual_one(tmp_path: Path) -> None:
    """As llama.cpp has it: what a converter writes where a model has none of its own."""
    logits = []
    for scale in (None, 0.0, 32**-0.5, 0.5):
        logits.append(logits_of(write_tiny(tmp_path / "tiny.gguf", attention_scale=scale, sharp=8)))
    assert np.array_equal(logits[0], logits[1])
    assert np.allclose(logits[0], logits[2], atol=1e-4)
    assert not np.array_equal(logits[0], logits[3])
