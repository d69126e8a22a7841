"""One timeline of tokens on a model: its memory, evaluation, records, statistics and state."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm import errors
from pyllm._native.loading import check, library
from pyllm._native.model import Model, ModelInfo
from pyllm.interruptible import interruptible
from pyllm.record import Record

# Up to this many tokens a call returns too quickly for Ctrl-C to need a thread.
SHORT_EVAL = 8

# Of a pointer to an array's numbers, by numpy's name of them.
C_TYPES = {"float32": "float[]", "uint8": "uint8_t[]", "bool": "uint8_t[]", "uint16": "uint16_t[]"}


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


# enum pyllm_kv_type
KV_TYPES = {"f16": 0, "q8_0": 1}


@dataclass(frozen=True)
class SessionParams:
    """The fields of pyllm_session_params; kv_type by name."""

    n_ctx: int
    n_batch: int
    n_sink: int
    kv_window: int = 0
    kv_type: str = "f16"
    activation_bits: int = 16

    def native(self) -> Any:
        return library()[0].new("pyllm_session_params *", asdict(self) | {"kv_type": KV_TYPES[self.kv_type]})


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

        Ctrl-C stops it between two layers; the session then holds whole batches of what it was given. Raises
        ArgumentError for a record of other arrays, before anything is evaluated.
        """
        ffi, lib = library()
        if record is not None:
            check_record(record, self.info, len(tokens))
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
        decode_share: float | None = None,
        page_drop: float = 1.0,
        channels: NDArray[np.uint16] | None = None,
        page_rest: float = 0.0,
        query_means: NDArray[np.float32] | None = None,
    ) -> None:
        """The fields of pyllm_attention, arrays contiguous; decode_share by default page_share.

        Raises ArgumentError for arrays of other shapes than the model's.
        """
        ffi, lib = library()
        attention = ffi.new("pyllm_attention *")
        attention.policy, attention.granularity, attention.n_window = policy, granularity, n_window
        attention.gaussian, attention.estimate = gaussian, estimate
        attention.page_bits, attention.page_drop = page_bits, page_drop
        attention.page_share, attention.page_rest = page_share, page_rest
        attention.decode_share = page_share if decode_share is None else decode_share
        heads = (self.info.n_layers, self.info.n_heads)
        kv_heads, d = (self.info.n_layers, self.info.n_kv_heads), self.info.head_dim
        given = {
            "thresholds": (thresholds, heads),
            "static_local": (static_local, heads),
            "coefficients": (coefficients, (*heads, 3)),
            "means": (means, (*kv_heads, d)),
            "covariances": (covariances, (*kv_heads, d, d)),
            "channels": (channels, (*kv_heads, d)),
            "query_means": (query_means, (*kv_heads, d)),
        }
        arrays = {}  # alive until the call has copied them
        for name, (array, shape) in given.items():
            if array is None:
                continue
            if array.shape != shape:
                raise errors.ArgumentError(f"{name} of shape {array.shape}, but the model has {shape}")
            arrays[name] = ffi.from_buffer(C_TYPES[array.dtype.name], array)
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
            check(lib.pyllm_session_tokens, self.handle, ffi.from_buffer("int32_t[]", out, True), len(out))
        return out

    def layer_stats(self) -> NDArray[np.uint64]:
        """(n_layers, 9) since the session's start: pairs, pairs_local, work, work_done, bytes, bytes_read,
        pages, pages_read, work_sketch: what of work_done were scores of the sketch."""
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


def check_record(record: Record, info: ModelInfo, n: int) -> None:
    """Raises ArgumentError, naming it, for an array of another shape or type than n tokens of a model have.

    The library writes as many values as these are, whatever there is room for.
    """
    masses = (info.n_layers, n, info.n_heads)
    shapes = {"audit": (n,), "queries": (*masses, info.head_dim)}
    for name in (f.name for f in fields(record)):
        array, shape = getattr(record, name), shapes.get(name, masses)
        kind = np.dtype(bool if name in ("audit", "is_long") else np.float32)
        if array is not None and (array.shape != shape or array.dtype != kind):
            raise errors.ArgumentError(
                f"record: {name} of shape {array.shape} and type {array.dtype}, "
                f"but this evaluation makes {shape} of {kind}"
            )


def _record_arrays(record: Record) -> dict[str, Any]:
    """The fields of pyllm_record. Raises ArgumentError for arrays that are not contiguous."""
    ffi, _ = library()
    given = {f.name: getattr(record, f.name) for f in fields(record)}
    for name, array in given.items():
        if array is not None and not array.flags.c_contiguous:
            raise errors.ArgumentError(f"record: {name} is not contiguous")
    return {
        name: ffi.from_buffer(C_TYPES[array.dtype.name], array, name != "audit")
        for name, array in given.items()
        if array is not None
    }
