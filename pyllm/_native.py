"""The native library through cffi: declared from its own header; handles, and status → exception.

Nothing here knows text, policies or sampling defaults. Calls release the GIL. Handles are freed with their
last reference, in any order: the library itself keeps a session's model open, and a model's file.
"""

from __future__ import annotations

import functools
import os
import re
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import cffi
import numpy as np
from numpy.typing import NDArray

from pyllm import errors
from pyllm.interruptible import interruptible
from pyllm.record import Record

LIBRARY = Path(__file__).parent / "_lib" / "libpyllm.so"
HEADER = Path(__file__).parent / "_lib" / "pyllm.h"

ERRORS: dict[int, type[errors.PyllmError]] = {
    1: errors.ArgumentError,
    2: errors.FileError,
    3: errors.FormatError,
    4: errors.UnsupportedError,
    5: errors.ContextError,
    6: errors.InsufficientMemoryError,
    7: errors.AbortedError,
    8: errors.NumericError,
    9: errors.DeviceError,
}

# GGUF value types, by number: numpy's name of a scalar's bytes.
DTYPES = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4"} | {
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9

# Up to this many tokens a call returns too quickly for Ctrl-C to need a thread.
SHORT_EVAL = 8


@functools.cache
def library() -> tuple[Any, Any]:
    """The (ffi, lib) pair, loaded once. $PYLLM_LIBRARY names another build, such as one with sanitizers.

    Raises FileError when the library is not built or does not load.
    """
    path = Path(os.environ.get("PYLLM_LIBRARY") or LIBRARY)
    if not path.exists() or not HEADER.exists():
        raise errors.FileError(f"{path}: the native library is not built; run: make -C native")
    ffi = cffi.FFI()
    ffi.cdef(declarations(HEADER.read_text(encoding="utf-8")))
    try:
        return ffi, ffi.dlopen(str(path))
    except OSError as error:
        raise errors.FileError(f"{path}: cannot be loaded: {error}") from error


def declarations(header: str) -> str:
    """The header without preprocessor lines, but for integer constants: what cffi parses."""
    return re.sub(r"^[ \t]*#(?!define[ \t]+\w+[ \t]+\d).*$", "", header, flags=re.MULTILINE)


def check(function: Any, *arguments: Any) -> None:
    """Calls a function whose last parameter is `pyllm_error *err` and raises what it reports."""
    ffi, _ = library()
    err = ffi.new("pyllm_error *")
    status = function(*arguments, err)
    if status:
        message = ffi.string(err.message).decode("utf-8", "replace")
        raise ERRORS.get(status, errors.PyllmError)(message or f"native status {status}")


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
            return list(_strings(data, value.n))
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


def _strings(data: bytes, n: int) -> Iterator[str | bytes]:
    unpack = struct.Struct("<Q").unpack_from
    start = 0
    for _ in range(n):
        end = start + 8 + unpack(data, start)[0]
        yield _str(data[start + 8 : end])
        start = end


@dataclass(frozen=True)
class DeviceInfo:
    """A GPU and its memory in bytes."""

    name: str
    free_bytes: int
    total_bytes: int


def device_info(device: str) -> DeviceInfo:
    """device: "cuda" or "cuda:N". Raises DeviceError, with the reason, where it cannot be used."""
    ffi, lib = library()
    out = ffi.new("pyllm_device_info *")
    check(lib.pyllm_device_get_info, device.encode(), out)
    return DeviceInfo(ffi.string(out.name).decode("utf-8", "replace"), out.free_bytes, out.total_bytes)


@dataclass(frozen=True)
class ModelInfo:
    """What the file says of the model, and what opening it took. Sizes in bytes."""

    architecture: str
    isa: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dim: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    n_threads: int
    n_params: int
    weight_bytes: int
    resident_bytes: int


class Model:
    """Weights, read-only, shared by any number of sessions; `isa` None takes the best this processor has.

    device: "cpu", "cuda" or "cuda:N".
    """

    def __init__(self, file: File, n_threads: int, isa: str | None = None, device: str = "cpu") -> None:
        ffi, lib = library()
        self.device = device
        name = ffi.NULL if isa is None else ffi.new("char[]", isa.encode())
        where = ffi.new("char[]", device.encode())
        params = ffi.new("pyllm_model_params *", {"n_threads": n_threads, "isa": name, "device": where})
        out = ffi.new("pyllm_model **")
        check(lib.pyllm_model_open, file.handle, params, out)
        self.handle = ffi.gc(out[0], lib.pyllm_model_close)
        self.info = self._read_info()

    @staticmethod
    def memory(file: File) -> int:
        """Bytes that opening a model from this file will hold resident."""
        ffi, lib = library()
        out = ffi.new("uint64_t *")
        check(lib.pyllm_model_memory, file.handle, out)
        return int(out[0])

    def _read_info(self) -> ModelInfo:
        ffi, lib = library()
        info = ffi.new("pyllm_model_info *")
        lib.pyllm_model_get_info(self.handle, info)
        values = {name: getattr(info, name) for name in ModelInfo.__dataclass_fields__}
        for name in ("architecture", "isa"):
            values[name] = ffi.string(values[name]).decode("utf-8", "replace")
        return ModelInfo(**values)


@dataclass(frozen=True)
class SessionMemory:
    """Bytes a session needs when its context is full; host_bytes of the host's memory beside a GPU's."""

    kv_bytes: int
    host_bytes: int
    moment_bytes: int
    sketch_bytes: int
    scratch_bytes: int

    @property
    def total(self) -> int:
        """Of the device's memory."""
        return self.kv_bytes + self.moment_bytes + self.sketch_bytes + self.scratch_bytes


@dataclass(frozen=True)
class SessionParams:
    """The fields of pyllm_session_params."""

    n_ctx: int
    n_batch: int
    n_sink: int
    kv_window: int = 0

    def native(self) -> Any:
        return library()[0].new("pyllm_session_params *", asdict(self))


def session_memory(model: Model, params: SessionParams, page_bits: int) -> SessionMemory:
    """What a session with these parameters would need under policies of page_bits."""
    ffi, lib = library()
    out = ffi.new("pyllm_session_memory *")
    check(lib.pyllm_session_memory_needed, model.handle, params.native(), page_bits, out)
    return SessionMemory(*(getattr(out, field.name) for field in fields(SessionMemory)))


class NativeSession:
    """One timeline of tokens.

    Every call takes the lock inside the thread that makes it, so that a call left behind by a double Ctrl-C
    is waited for and never joined by a second one.
    """

    def __init__(self, model: Model, params: SessionParams) -> None:
        ffi, lib = library()
        out = ffi.new("pyllm_session **")
        check(lib.pyllm_session_open, model.handle, params.native(), out)
        self.handle = ffi.gc(out[0], lib.pyllm_session_close)
        self.info = model.info
        self.lock = threading.Lock()

    def eval(
        self, tokens: NDArray[np.int32], logits: NDArray[np.float32], record: Record | None = None
    ) -> None:
        """Evaluates tokens (n,) and fills logits (n_logits, n_vocab) with those of the last n_logits <= n
        tokens, and record, of n tokens and contiguous arrays, with what attention decided.

        Ctrl-C stops it between two layers; the session then holds whole batches of what it was given.
        """
        ffi, lib = library()
        ids, out = ffi.from_buffer("int32_t[]", tokens), ffi.from_buffer("float[]", logits, True)

        def call() -> None:
            arrays = {} if record is None else _record_arrays(record)  # alive until they are filled
            filled = ffi.NULL if record is None else ffi.new("pyllm_record *", arrays)
            with self.lock:
                check(lib.pyllm_session_eval, self.handle, ids, len(tokens), out, len(logits), filled)

        if len(tokens) > SHORT_EVAL:
            interruptible(call, self.abort)
        else:
            call()

    def abort(self) -> None:
        """From any thread: a running eval stops before its next layer and raises AbortedError."""
        library()[1].pyllm_session_abort(self.handle)

    def set_attention(
        self,
        policy: int,
        granularity: int,
        n_window: int,
        thresholds: NDArray[np.float32] | None,
        static_local: NDArray[np.uint8] | None,
        gaussian: int = 0,
        estimate: int = 0,
        coefficients: NDArray[np.float32] | None = None,
        means: NDArray[np.float32] | None = None,
        covariances: NDArray[np.float32] | None = None,
        page_bits: int = 0,
        page_share: float = 0.0,
        page_drop: float = 1.0,
    ) -> None:
        """The fields of pyllm_attention, arrays contiguous.

        Raises ArgumentError for arrays of other shapes than the model's.
        """
        ffi, lib = library()
        attention = ffi.new("pyllm_attention *")
        attention.policy, attention.granularity, attention.n_window = policy, granularity, n_window
        attention.gaussian, attention.estimate = gaussian, estimate
        attention.page_bits, attention.page_share, attention.page_drop = page_bits, page_share, page_drop
        heads = (self.info.n_layers, self.info.n_heads)
        kv_heads, d = (self.info.n_layers, self.info.n_kv_heads), self.info.head_dim
        given = {
            "thresholds": (thresholds, heads),
            "static_local": (static_local, heads),
            "coefficients": (coefficients, (*heads, 3)),
            "means": (means, (*kv_heads, d)),
            "covariances": (covariances, (*kv_heads, d, d)),
        }
        arrays = {}  # alive until the call has copied them
        for name, (array, shape) in given.items():
            if array is None:
                continue
            if array.shape != shape:
                raise errors.ArgumentError(f"{name} of shape {array.shape}, but the model has {shape}")
            arrays[name] = ffi.from_buffer("uint8_t[]" if array.dtype == np.uint8 else "float[]", array)
            setattr(attention, name, arrays[name])
        with self.lock:
            check(lib.pyllm_session_set_attention, self.handle, attention)

    def rewind(self, n: int) -> None:
        with self.lock:
            check(library()[1].pyllm_session_rewind, self.handle, n)

    def sync(self, tokens: NDArray[np.int32]) -> int:
        """Rewinds to the longest common prefix, at most n - 1 tokens; returns how many were kept."""
        ffi, lib = library()
        kept = ffi.new("int32_t *")
        with self.lock:
            ids = ffi.from_buffer("int32_t[]", tokens)
            check(lib.pyllm_session_sync, self.handle, ids, len(tokens), kept)
        return int(kept[0])

    @property
    def position(self) -> int:
        with self.lock:
            return int(library()[1].pyllm_session_position(self.handle))

    @property
    def tokens(self) -> NDArray[np.int32]:
        ffi, lib = library()
        with self.lock:
            out = np.empty(lib.pyllm_session_position(self.handle), np.int32)
            lib.pyllm_session_tokens(self.handle, ffi.from_buffer("int32_t[]", out, True))
        return out

    def layer_stats(self) -> NDArray[np.uint64]:
        """(n_layers, 8) since the session's start: pairs, pairs_local, work, work_done, bytes, bytes_read,
        pages, pages_read."""
        ffi, lib = library()
        fields = ffi.sizeof("pyllm_layer_stats") // 8
        out = np.zeros((self.info.n_layers, fields), np.uint64)
        with self.lock:
            lib.pyllm_session_layer_stats(self.handle, ffi.from_buffer("pyllm_layer_stats[]", out))
        return out

    def stage_stats(self) -> list[tuple[str, int, int, int]]:
        """(name, calls, nanoseconds, bytes streamed) of every stage."""
        ffi, lib = library()
        with self.lock:
            n = lib.pyllm_session_stage_stats(self.handle, ffi.NULL, 0)
            out = ffi.new("pyllm_stage_stats[]", n)
            lib.pyllm_session_stage_stats(self.handle, out, n)
        return [(ffi.string(s.name).decode(), int(s.calls), int(s.ns), int(s.bytes)) for s in out]

    def moments(
        self, layer: int, kv_head: int, n_pages: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys of the first `n_pages` bulk pages: mean (head_dim,), covariance (head_dim, head_dim), ddof
        0."""
        ffi, lib = library()
        d = self.info.head_dim
        mean, cov = np.empty(d, np.float32), np.empty((d, d), np.float32)
        pointers = ffi.from_buffer("float[]", mean), ffi.from_buffer("float[]", cov)
        with self.lock:
            check(lib.pyllm_session_moments, self.handle, layer, kv_head, n_pages, *pointers)
        return mean, cov

    def save(self) -> NDArray[np.uint8]:
        """Tokens and KV cache as bytes (n,) uint8."""
        ffi, lib = library()
        with self.lock:
            out = np.empty(lib.pyllm_session_state_size(self.handle), np.uint8)
            check(lib.pyllm_session_save, self.handle, ffi.from_buffer("uint8_t[]", out), len(out))
        return out

    def load(self, state: NDArray[np.uint8]) -> None:
        """Replaces the contents by what `save` gave, for the same model and sinks."""
        ffi, lib = library()
        with self.lock:
            check(lib.pyllm_session_load, self.handle, ffi.from_buffer("uint8_t[]", state), len(state))


def _record_arrays(record: Record) -> dict[str, Any]:
    """The fields of pyllm_record."""
    ffi, _ = library()
    types = {"audit": "uint8_t[]", "is_long": "uint8_t[]"}
    return {
        f.name: ffi.from_buffer(types.get(f.name, "float[]"), getattr(record, f.name), f.name != "audit")
        for f in fields(record)
    }


def sample(
    logits: NDArray[np.float32], params: dict[str, float], recent: NDArray[np.int32], rng: NDArray[np.uint64]
) -> int:
    """Draws a token from logits (n_vocab,).

    params: fields of pyllm_sampling; recent: (n,) ids for the penalties; rng: (1,) its state, advanced in
    place.
    """
    ffi, lib = library()
    out = ffi.new("int32_t *")
    check(
        lib.pyllm_sample,
        ffi.from_buffer("float[]", logits),
        len(logits),
        ffi.new("pyllm_sampling *", params),
        ffi.from_buffer("int32_t[]", recent),
        len(recent),
        ffi.from_buffer("uint64_t[]", rng, True),
        out,
    )
    return int(out[0])
