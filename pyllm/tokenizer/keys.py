"""Typed access to GGUF metadata: a missing or mistyped value is one FormatError that names its key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from pyllm.errors import FormatError

Metadata = Mapping[str, object]


def fail(key: str, cause: str) -> NoReturn:
    raise FormatError(f"key {key}: {cause}")


def require(metadata: Metadata, key: str) -> object:
    if key not in metadata:
        fail(key, "missing")
    return metadata[key]


def string(metadata: Metadata, key: str) -> str:
    value = require(metadata, key)
    return value if isinstance(value, str) else fail(key, f"expected a string, not {_kind(value)}")


def boolean(metadata: Metadata, key: str, default: bool) -> bool:
    value = metadata.get(key, default)
    return value if isinstance(value, bool) else fail(key, f"expected a boolean, not {_kind(value)}")


def size(metadata: Metadata, key: str, default: int | None = None) -> int:
    """At least 1."""
    value = require(metadata, key) if default is None else metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        fail(key, f"expected an integer, not {_kind(value)}")
    return value if value >= 1 else fail(key, f"expected at least 1, not {value}")


def token_id(metadata: Metadata, key: str, n_vocab: int) -> int | None:
    """The id, or None where the key is absent."""
    if key not in metadata:
        return None
    value = metadata[key]
    if not isinstance(value, int) or isinstance(value, bool):
        fail(key, f"expected an integer, not {_kind(value)}")
    if not 0 <= value < n_vocab:
        fail(key, f"{value} is not a token of the vocabulary of {n_vocab}")
    return value


def strings(metadata: Metadata, key: str) -> list[str]:
    value = require(metadata, key)
    if not isinstance(value, list):
        fail(key, f"expected an array of strings, not {_kind(value)}")
    if set(map(type, value)) - {str}:
        index, item = next((i, item) for i, item in enumerate(value) if not isinstance(item, str))
        what = "bytes that are not UTF-8" if isinstance(item, bytes) else _kind(item)
        fail(key, f"expected strings, but entry {index} is {what}")
    return value


def integers(metadata: Metadata, key: str, length: int) -> NDArray[np.int64]:
    """(length)"""
    return _array(metadata, key, length, "iu", "integers").astype(np.int64)


def floats(metadata: Metadata, key: str, length: int) -> NDArray[np.float32]:
    """(length), finite"""
    values = _array(metadata, key, length, "iuf", "numbers").astype(np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        fail(key, f"entry {int(np.argmin(finite))} is not a finite number")
    return values


def _array(metadata: Metadata, key: str, length: int, kinds: str, what: str) -> NDArray[np.generic]:
    value = require(metadata, key)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        array = np.asarray(None)
    if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
        fail(key, f"expected an array of {what}, not {_kind(value)}")
    if array.size != length:
        fail(key, f"{array.size} entries for {length} tokens")
    return array


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    return {bool: "a boolean", int: "an integer", float: "a float", str: "a string", list: "an array"}.get(
        type(value), type(value).__name__
    )
