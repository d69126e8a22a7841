"""Session: one mutable timeline of tokens on a model, with its KV cache, attention policy and statistics."""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.filesize import decimal

from pyllm import _native, atomic_file
from pyllm.attention import Policy
from pyllm.device import available_on, memory_of
from pyllm.errors import (
    AbortedError,
    ArgumentError,
    ContextError,
    FileError,
    InsufficientMemoryError,
    PyllmError,
)
from pyllm.guard import Guard
from pyllm.guard.watch import Watch
from pyllm.record import Record
from pyllm.stats import Stats

Ids = Sequence[int] | NDArray[np.integer]
# (tokens done, tokens in all) after every batch of a prefill
Progress = Callable[[int, int], None]


class Session:
    """Made by `LLM.session()`. Safe to use from several threads: a second one waits for the first.

    n_ctx: tokens it can hold. split: keys and values of a GPU's session lie in the host's memory but for the
    sinks, the window and a batch. kv_type, activation_bits: as of `LLM`. policy: finds
    the policy that a text stands for. `revision` changes with the contents, so that whoever goes on where
    they left off can tell that nobody else was there meanwhile. identity: of the model, for the guard's log.
    """

    def __init__(
        self,
        model: _native.Model,
        *,
        n_ctx: int,
        n_batch: int,
        split: bool = False,
        kv_type: str = "f16",
        activation_bits: int = 16,
        attention: Policy,
        policy: Callable[[Policy | str], Policy],
        guard: Guard | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.n_ctx = n_ctx
        self.n_batch = n_batch
        self.n_vocab = model.info.n_vocab
        self.sinks = attention.sinks
        self.lock = threading.RLock()
        self.revision = 0
        self._model = model
        self._policy = policy
        self._kv_window = min(attention.window, n_ctx) if split else 0
        self.kv_type = kv_type
        self.activation_bits = activation_bits
        self._attention = attention
        self._require_memory()
        self._native = _native.NativeSession(model, self._params(n_ctx))
        self._evaluated: Counter[str] = Counter()
        self._seconds = {"prefill": 0.0, "decode": 0.0}
        self._tokens = {"prefill": 0, "decode": 0}
        self._identity = identity or {}
        self._aborted = threading.Event()
        self.watch: Watch | None = None
        self.attention = attention
        self.guard = guard

    def _params(self, n_ctx: int) -> _native.SessionParams:
        return _native.SessionParams(
            n_ctx, self.n_batch, self.sinks, self._kv_window, self.kv_type, self.activation_bits
        )

    def _require_memory(self) -> None:
        self._require(self._model.device, self.memory_needed)
        if self._kv_window:
            self._require("cpu", self.host_memory_needed)

    def _require(self, device: str, memory_needed: Callable[[int], int]) -> None:
        needed, available = memory_needed(self.n_ctx), available_on(device)
        if available is None or needed <= available:
            return
        fits = bisect_right(range(1, self.n_ctx), available, key=memory_needed)
        raise InsufficientMemoryError(
            f"a context of {self.n_ctx} tokens needs {decimal(needed)} of {memory_of(device)}, "
            f"but only {decimal(available)} is available: enough for {fits or 'no'} tokens"
        )

    def memory_needed(self, n_ctx: int) -> int:
        """Bytes of the device's memory that a session like this one needs for a context of n_ctx tokens."""
        return self._memory(n_ctx).total

    def host_memory_needed(self, n_ctx: int) -> int:
        """Bytes of the host's memory that it needs besides, where its cache is split."""
        return self._memory(n_ctx).host_bytes

    def _memory(self, n_ctx: int) -> _native.SessionMemory:
        return _native.session_memory(self._model, self._params(n_ctx), self._attention.sketch)

    def belongs_to(self, model: _native.Model) -> bool:
        return self._model is model

    # ---- the timeline ----

    @property
    def position(self) -> int:
        """How many tokens it holds."""
        return self._native.position

    @property
    def tokens(self) -> list[int]:
        """The tokens it holds."""
        return [int(token) for token in self._native.tokens]

    def eval(
        self,
        ids: Ids,
        all_logits: bool = False,
        progress: Progress | None = None,
        record: Record | None = None,
    ) -> NDArray[np.float32]:
        """Evaluates ids after the tokens already there.

        Returns float32 logits (n_vocab,) of the last token, or (len(ids), n_vocab) with `all_logits`. record:
        one of `new_record(len(ids))`, filled batch by batch with what attention decided.
        Ctrl-C and errors leave the session with a whole number of batches of the ids, ready to go on; where
        they stop a repair, with what was verified before it.
        Raises ArgumentError for no ids, ids out of range or a record of another size and ContextError where
        they do not fit, all before anything is evaluated.
        """
        tokens = self.checked(ids)
        if record is not None:
            self._check_record(record, len(tokens))
        with self.lock:
            self.require_room(self.position + len(tokens))
            kind = "prefill" if len(tokens) > 1 else "decode"
            return self._evaluate(tokens, all_logits, progress, kind, record)

    def new_record(self, n: int, audit: ArrayLike = False, *, queries: bool = False) -> Record:
        """For an `eval` of n tokens. audit: truth values (n,), or one for all: whose true masses to compute.
        queries: whether to copy the queries.

        Raises ArgumentError where audit has another shape.
        """
        try:
            mask = np.broadcast_to(np.asarray(audit, bool), (n,)).copy()
        except ValueError:
            raise ArgumentError(f"audit: shape {np.shape(audit)}, but there are {n} tokens") from None
        info = self._model.info
        return Record.empty(info.n_layers, info.n_heads, mask, info.head_dim if queries else 0)

    def _check_record(self, record: Record, n: int) -> None:
        expected = (self._model.info.n_layers, n, self._model.info.n_heads)
        if self.watch:
            raise ArgumentError("record: a guarded session keeps its own records; set its guard to None")
        if record.is_long.shape != expected:
            raise ArgumentError(f"record: shape {record.is_long.shape}, but this evaluation makes {expected}")
        _native.check_record(record, self._model.info, n)

    def sync(self, ids: Ids, progress: Progress | None = None) -> NDArray[np.float32]:
        """Makes ids the contents: keeps the common prefix, drops what follows it, evaluates what is new.

        Returns the last token's logits (n_vocab,), which is therefore always evaluated. Raises as `eval`
        does.
        """
        tokens = self.checked(ids)
        with self.lock:
            self.require_room(len(tokens))
            self.revision += 1
            before = self.position
            kept = self._native.sync(tokens)
            if kept < before:
                kept = self._follow_rewind(kept)
            return self._evaluate(tokens[kept:], False, progress, "prefill")

    def rewind(self, n_tokens: int) -> None:
        """Drops every token from position n_tokens on. Raises ArgumentError where it holds fewer."""
        with self.lock:
            if not 0 <= n_tokens <= self.position:
                raise ArgumentError(f"rewind to {n_tokens}: the session holds {self.position} tokens")
            if n_tokens == self.position:
                return
            tokens = self._native.tokens[:n_tokens]
            self.revision += 1
            self._native.rewind(n_tokens)
            kept = self._follow_rewind(n_tokens)
            if kept < n_tokens:
                self._evaluate(tokens[kept:], False, None, "prefill")

    def _follow_rewind(self, n_tokens: int) -> int:
        """After a rewind to n_tokens: how many of them stand, the others are dropped too.

        What a repair made dense for a reason that is now gone is evaluated again, so that the same tokens
        give the same decisions whatever was there before.
        """
        return self.watch.rewind(n_tokens) if self.watch else n_tokens

    def verify(self) -> NDArray[np.float32] | None:
        """Has the guard audit the last token, where it is not verified yet.

        Returns that token's logits (n_vocab,) if it was evaluated again for this, after a repair if one was
        needed; None where there was nothing to do. Raises ArgumentError without a guard.
        """
        with self.lock:
            if not self.watch:
                raise ArgumentError("verify: the session has no guard")
            last = self.position - 1
            if self.watch.verified > last:
                return None
            token = self._native.tokens[last:]
            self._native.rewind(last)
            self.watch.rewind(last)
            self.watch.demand(last)
            return self._evaluate(token, False, None, "decode")

    def abort(self) -> None:
        """From another thread: a running evaluation stops before its next layer and raises AbortedError."""
        self._aborted.set()
        self._native.abort()

    def checked(self, ids: Ids) -> NDArray[np.int32]:
        """Ids (n,) of the model's vocabulary. Raises ArgumentError for anything else."""
        array = np.asarray(ids)
        if array.ndim != 1 or array.size == 0:
            raise ArgumentError(
                f"token ids: expected at least one, in one dimension, got shape {array.shape}"
            )
        if array.dtype.kind not in "iu":
            raise ArgumentError(f"token ids: expected whole numbers, got {array.dtype}")
        # One look at one id: token by token, numpy's two passes take 27 us with cold caches.
        least, most = (array[0], array[0]) if array.size == 1 else (array.min(), array.max())
        if least < 0 or most >= self.n_vocab:
            at = int(((array < 0) | (array >= self.n_vocab)).argmax())
            raise ArgumentError(f"token id {array[at]} at index {at} is not in 0..{self.n_vocab - 1}")
        return np.ascontiguousarray(array, np.int32)

    def require_room(self, n_tokens: int) -> None:
        """Raises ContextError, with the numbers, where the context cannot hold n_tokens in all."""
        if n_tokens <= self.n_ctx:
            return
        trained = self._model.info.n_ctx_train
        beyond = f" (the model was trained on at most {trained})" if n_tokens > trained else ""
        raise ContextError(
            f"the prompt makes {n_tokens} tokens, but the context holds {self.n_ctx}; a context "
            f"of {n_tokens} tokens needs {decimal(self.memory_needed(n_tokens))} of memory{beyond}"
        )

    def _evaluate(
        self,
        tokens: NDArray[np.int32],
        all_logits: bool,
        progress: Progress | None,
        kind: str,
        record: Record | None = None,
    ) -> NDArray[np.float32]:
        self.revision += 1
        self._aborted.clear()
        start, began = self.position, time.perf_counter()
        logits = np.empty((len(tokens) if all_logits else 1, self.n_vocab), np.float32)

        def rows(first: int, stop: int) -> NDArray[np.float32]:
            """Where the logits of positions [first, stop) go, those before `start` nowhere."""
            if all_logits:
                return logits[max(0, first - start) : max(0, stop - start)]
            return logits[: int(stop == start + len(tokens))]

        try:
            for first, stop in self._batches(start, start + len(tokens)):
                batch = tokens[first - start : stop - start]
                if self.watch:
                    self.watch.evaluate(batch, rows)
                else:
                    self._evaluate_batch(batch, rows(first, stop), record, first - start)
                if progress:
                    progress(stop - start, len(tokens))
                if self._aborted.is_set() and stop < start + len(tokens):  # between two calls of the library
                    raise AbortedError(f"evaluation stopped at position {stop}")
        finally:
            n = max(0, self.position - start)
            self._tokens[kind] += n
            self._evaluated[self._attention_name] += n
            self._seconds[kind] += time.perf_counter() - began
        return logits if all_logits else logits[0]

    def _batches(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Cuts positions [start, end) into what is evaluated at once."""
        while start < end:
            stop = min(start + self.n_batch, end)
            if self.watch:
                stop = min(stop, self.watch.stop(start))
            yield start, stop
            start = stop

    def _evaluate_batch(
        self, batch: NDArray[np.int32], rows: NDArray[np.float32], record: Record | None, first: int
    ) -> None:
        """first: of the batch in the record."""
        part = None if record is None else record.part(first, first + len(batch))
        self._native.eval(batch, rows, part)
        if record is not None and part is not None:
            record.put(first, part)

    # ---- attention ----

    @property
    def attention(self) -> Policy:
        """The policy for tokens evaluated from now on; set as a policy, its text form or a preset's name. Its
        sinks must be the session's, unless it reads everything."""
        return self._attention

    @attention.setter
    def attention(self, attention: Policy | str) -> None:
        policy = self._policy(attention)
        if policy.sinks != self.sinks and not policy.reads_all:
            raise ArgumentError(
                f"attention: {policy.sinks} sinks, but the session was opened with {self.sinks}"
            )
        with self.lock:
            self._native.set_attention(**policy.native(self._model.info.n_layers, self._model.info.n_heads))
            self._attention, self._attention_name = policy, str(policy)
            if self.watch:
                self.watch.follow(policy)

    @property
    def guard(self) -> Guard | None:
        """What watches over the tokens evaluated from now on. Setting one begins with fresh counts and, if it
        asks for one, a new log. One that is refused changes nothing, but that the one before has no log any
        more where both name the same file."""
        return self.watch.guard if self.watch else None

    @guard.setter
    def guard(self, guard: Guard | None) -> None:
        if guard is not None and not isinstance(guard, Guard):
            raise ArgumentError(f"guard: expected a Guard or None, got {guard!r}")
        with self.lock:
            before = self.watch
            if before and guard and guard.log == before.guard.log:
                before.close()  # the new one's file is not another's
            watch = None
            if guard:
                watch = Watch(guard, self._native, self._attention, self.n_batch, self._identity)
            if before:
                before.close()
            self.watch = None
            self.attention = self._attention
            self.watch = watch

    def key_moments(
        self, layer: int, kv_head: int, n_pages: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean (head_dim,) and covariance (head_dim, head_dim), ddof 0, of a key/value head's keys.

        Those of the first n_pages pages of 64 tokens behind the sinks; raises ArgumentError where the session
        holds fewer.
        """
        with self.lock:
            return self._native.moments(layer, kv_head, n_pages)

    @property
    def stats(self) -> Stats:
        """A snapshot since the session was opened; `after - before` gives what happened between two."""
        with self.lock:
            return Stats(
                self._native.layer_stats(),
                dict(self._evaluated),
                self._tokens["prefill"],
                self._seconds["prefill"],
                self._tokens["decode"],
                self._seconds["decode"],
                self.watch.tally if self.watch else None,
            )

    # ---- on disk ----

    def save(self, path: str | PathLike[str]) -> None:
        """Writes tokens and KV cache to a file, whole or not at all. Raises FileError."""
        with self.lock:
            state = self._native.save()
        try:
            atomic_file.write(Path(path), state.data)
        except OSError as error:
            raise FileError(f"{path}: the session could not be saved: {error.strerror or error}") from None

    def load(self, path: str | PathLike[str]) -> None:
        """Replaces the contents by those of a file that `save` wrote with the same model and sinks.

        Raises FileError where it cannot be read, FormatError and UnsupportedError for what is no such file,
        ContextError where its tokens do not fit; the contents stay as they were then.
        """
        try:
            state = np.fromfile(path, np.uint8)
        except OSError as error:
            raise FileError(f"{path}: the session could not be read: {error.strerror or error}") from None
        with self.lock:
            self.revision += 1
            try:
                self._native.load(state)
            except PyllmError as error:
                raise type(error)(f"{path}: {error}") from None
            if self.watch:
                self.watch.follow(self._attention)
