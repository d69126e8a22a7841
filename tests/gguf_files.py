"""Tiny GGUF files: valid ones through gguf's writer, and any, valid or broken, put together by hand."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value

from pyllm import _native

FORMATS = {
    Value.UINT8: "<B",
    Value.INT8: "<b",
    Value.UINT16: "<H",
    Value.INT16: "<h",
    Value.UINT32: "<I",
    Value.INT32: "<i",
    Value.FLOAT32: "<f",
    Value.BOOL: "<?",
    Value.UINT64: "<Q",
    Value.INT64: "<q",
    Value.FLOAT64: "<d",
}

# ---- by gguf ----


def write(
    path: Path,
    values: Mapping[str, tuple[Value, Any]],
    tensors: Mapping[str, tuple[np.ndarray, Type]],
    alignment: int | None = None,
    tensors_per_part: int = 0,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> list[Path]:
    """Writes with gguf.GGUFWriter and returns the parts, one unless `tensors_per_part` splits the file.

    values: type and value; arrays give their items' type and a list. tensors: quantized ones as uint8 rows.
    """
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=tensors_per_part, endianess=endianess)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, (kind, value) in values.items():
        if isinstance(value, list):
            writer.add_key_value(key, value, Value.ARRAY, sub_type=kind)
        else:
            writer.add_key_value(key, value, kind)
    for name, (data, type_) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}-*-of-*{path.suffix}")) or [path]


# ---- by hand: every function returns bytes, and nothing is checked ----


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def payload(kind: int, value: Any) -> bytes:
    return string(value) if kind == Value.STRING else struct.pack(FORMATS[Value(kind)], value)


def scalar(key: bytes, kind: int, value: Any) -> bytes:
    """One metadata entry; `value` as bytes is taken as it is, but for strings."""
    raw = value if isinstance(value, bytes) and kind != Value.STRING else payload(kind, value)
    return string(key) + struct.pack("<I", kind) + raw


def array(key: bytes, kind: int, items: Sequence[Any], length: int | None = None) -> bytes:
    """One metadata entry with the given item type; `length` is what the file claims to hold."""
    head = struct.pack("<IIQ", Value.ARRAY, kind, len(items) if length is None else length)
    return string(key) + head + b"".join(payload(kind, item) for item in items)


def tensor(name: bytes, shape: Sequence[int], kind: int = Type.F32, offset: int = 0) -> bytes:
    """One entry of the tensor directory."""
    return (
        string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, offset)
    )


def assemble(
    values: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    alignment: int = 32,
    version: int = 3,
    n_values: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """A whole file. The counts are what the header claims; None tells the truth."""
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(values) if n_values is None else n_values,
    )
    body = head + b"".join(values) + b"".join(tensors)
    return body + bytes(-len(body) % alignment) + data


def small() -> bytes:
    """A valid file of under 500 bytes with scalars, arrays and two tensors, the last ending with the file."""
    values = [
        scalar(b"general.architecture", Value.STRING, b"llama"),
        scalar(b"a.u32", Value.UINT32, 7),
        scalar(b"a.bool", Value.BOOL, True),
        array(b"a.strings", Value.STRING, [b"x", b"", "é".encode()]),
        array(b"a.floats", Value.FLOAT32, [0.5, -2.0]),
    ]
    tensors = [tensor(b"w", (32, 2), Type.Q4_0), tensor(b"b", (4,), Type.F32, offset=64)]
    return assemble(values, tensors, bytes(range(64 + 16)))


# ---- opened ----


def open_bytes(*parts: bytes) -> _native.File:
    """The parts as files that are gone again once they are mapped (or refused)."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"part{i}.gguf" for i in range(len(parts))]
        for path, part in zip(paths, parts, strict=True):
            path.write_bytes(part)
        return _native.File(paths)


def tensor_data(file: _native.File) -> dict[str, bytes]:
    """Every tensor's bytes as the library sees them."""
    ffi, lib = _native.library()
    pointers = [lib.pyllm_file_tensor(file.handle, i).data for i in range(len(file.tensors()))]
    return {
        t.name: bytes(ffi.buffer(pointer, t.size))
        for t, pointer in zip(file.tensors(), pointers, strict=True)
    }


def read_everything(file: _native.File) -> None:
    """Touches all that the file offers: a bad pointer ends the process."""
    for key, value in file.values().items():
        assert isinstance(key, str), key
        assert value is not None, key
    for t, data in zip(file.tensors(), tensor_data(file).values(), strict=True):
        assert len(data) == t.size
    assert len(file.fingerprint) == 16


def sparse(path: Path, head: bytes, size: int) -> Path:
    """A file that starts with `head` and claims `size` bytes, which take no space on the disk."""
    path.write_bytes(head)
    os.truncate(path, size)
    return path
