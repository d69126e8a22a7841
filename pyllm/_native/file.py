"""A GGUF file: its keys, its tensor directory, its fingerprint."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyllm import errors
from pyllm._native.loading import check, library

# GGUF value types, by number: numpy's name of a scalar's bytes.
DTYPES = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4"} | {
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    """An entry of the tensor directory: `shape[0]` is the contiguous dimension, `offset` and `size` are
    bytes."""

    name: str
    type: int
    type_name: str
    shape: tuple[int, ...]
    size: int
    offset: int
    part: int


class File:
    """A mapped GGUF file: `paths` are the parts of one model in order.

    Raises FileError, FormatError or UnsupportedError, naming the file, the key or tensor and the offset.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        ffi, lib = library()
        self.paths = [Path(path) for path in paths]
        strings = [ffi.new("char[]", str(path).encode("utf-8", "surrogateescape")) for path in self.paths]
        out = ffi.new("pyllm_file **")
        check(lib.pyllm_file_open, ffi.new("char *[]", strings), len(strings), out)
        self.handle = ffi.gc(out[0], lib.pyllm_file_close)

    def values(self) -> dict[str, Any]:
        """Scalars as int, float, bool or str, arrays of numbers as numpy arrays, of strings as lists.

        A string that is not UTF-8 stays bytes.
        """
        ffi, lib = library()
        entries = (lib.pyllm_file_value(self.handle, i) for i in range(lib.pyllm_file_n_values(self.handle)))
        return {_text(ffi, value.key, value.key_size): self._decode(value) for value in entries}

    def _decode(self, value: Any) -> Any:
        ffi, _ = library()
        data = ffi.buffer(value.data, value.size)[:] if value.size else b""
        if value.type == STRING:
            return _str(data[8:])
        if value.type != ARRAY:
            return np.frombuffer(data, DTYPES[value.type])[0].item()
        if value.item_type == STRING:
            return _strings(data, value.n)
        if value.item_type in DTYPES:
            return np.frombuffer(data, DTYPES[value.item_type])
        key = _text(ffi, value.key, value.key_size)
        raise errors.UnsupportedError(
            f"{self.paths[0]}: key {key}: arrays of type {value.item_type} cannot be read"
        )

    def tensors(self) -> list[Tensor]:
        """The tensor directory, in the file's order."""
        _, lib = library()
        n = lib.pyllm_file_n_tensors(self.handle)
        return [self._tensor(lib.pyllm_file_tensor(self.handle, i)) for i in range(n)]

    def _tensor(self, entry: Any) -> Tensor:
        ffi, lib = library()
        name = lib.pyllm_type_name(entry.type)
        return Tensor(
            name=_text(ffi, entry.name, entry.name_size),
            type=entry.type,
            type_name=ffi.string(name).decode() if name != ffi.NULL else f"type {entry.type}",
            shape=tuple(entry.shape[i] for i in range(entry.n_dims)),
            size=entry.size,
            offset=entry.offset,
            part=entry.part,
        )

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell models apart: what saved sessions and profiles are bound to."""
        return f"{library()[1].pyllm_file_fingerprint(self.handle):016x}"


def _text(ffi: Any, pointer: Any, size: int) -> str:
    return bytes(ffi.buffer(pointer, size)).decode("utf-8", "replace")


def _str(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _strings(data: bytes, n: int) -> list[str | bytes]:
    unpack = struct.Struct("<Q").unpack_from
    found: list[bytes] = []
    start = 0
    for _ in range(n):
        end = start + 8 + unpack(data, start)[0]
        found.append(data[start + 8 : end])
        start = end
    try:
        return [string.decode() for string in found]
    except UnicodeDecodeError:
        return [_str(string) for string in found]
