"""What a model says about itself: refused, or taken as it is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyllm import _native
from pyllm.errors import UnsupportedError
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
