"""What a model says about itself: refused, or taken as it is meant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from pyllm import _native
from pyllm.errors import FormatError, UnsupportedError
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
