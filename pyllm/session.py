"""Session: one mutable timeline of tokens on a model, with its KV cache, attention policy and statistics."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.filesize import decimal

from pyllm import _native, atomic_file
from pyllm.attention import Dense, Policy
from pyllm.errors import ArgumentError, ContextError, FileError, InsufficientMemoryError, PyllmError
from pyllm.memory import available_memory
from pyllm.record import Record
from pyllm.stats import Stats

Ids = Sequence[int] | NDArray[np.integer]
# (tokens done, tokens in all) after every batch of a prefill
Progress = Callable[[int, int], None]


class Session:
    """Made by `LLM.session()`. Safe to use from several threads: a second one waits for the first.

    n_ctx: tokens it can hold. `revision` changes with the contents, so that whoever goes on where they left
    off can tell that nobody else was there meanwhile.
    """

    def __init__(self, model: _native.Model, *, n_ctx: int, n_batch: int, attention: Policy) -> None:
        self.n_ctx = n_ctx
        self.n_batch = n_batch
        self.n_vocab = model.info.n_vocab
        self.sinks = attention.sinks
        self.lock = threading.RLock()
        self.revision = 0
        self._model = model
        self._require_memory()
        self._native = _native.NativeSession(model, n_ctx, n_batch, self.sinks)
        self._evaluated: Counter[str] = Counter()
        self._seconds = {"prefill": 0.0, "decode": 0.0}
        self._tokens = {"prefill": 0, "decode": 0}
        self.attention = attention

    def _require_memory(self) -> None:
        needed, available = self.memory_needed(self.n_ctx), available_memory()
        if available is not None and needed > available:
            raise InsufficientMemoryError(
                f"a context of {self.n_ctx} tokens needs {decimal(needed)} of memory, but only "
                f"{decimal(available)} is available; a smaller n_ctx needs less"
            )

    def memory_needed(self, n_ctx: int) -> int:
        """Bytes that a session like this one needs for a context of n_ctx tokens."""
        return _native.session_memory(self._model, n_ctx, self.n_batch, self.sinks).total

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
        Ctrl-C and errors leave the session with a whole number of batches of the ids, ready to go on.
        Raises ArgumentError for no ids, ids out of range or a record of another size and ContextError where
        they do not fit, all before anything is evaluated.
        """
        tokens = self._checked(ids)
        if record is not None:
            self._check_record(record, len(tokens))
        with self.lock:
            self.require_room(self.position + len(tokens))
            kind = "prefill" if len(tokens) > 1 else "decode"
            return self._evaluate(tokens, all_logits, progress, kind, record)

    def new_record(self, n: int, audit: ArrayLike = False) -> Record:
        """For an `eval` of n tokens. audit: truth values (n,), or one for all: whose true masses to compute.

        Raises ArgumentError where audit has another shape.
        """
        try:
            mask = np.broadcast_to(np.asarray(audit, bool), (n,)).copy()
        except ValueError:
            raise ArgumentError(f"audit: shape {np.shape(audit)}, but there are {n} tokens") from None
        return Record.empty(self._model.info.n_layers, self._model.info.n_heads, mask)

    def _check_record(self, record: Record, n: int) -> None:
        expected = (self._model.info.n_layers, n, self._model.info.n_heads)
        if record.is_long.shape != expected:
            raise ArgumentError(f"record: shape {record.is_long.shape}, but this evaluation makes {expected}")

    def sync(self, ids: Ids, progress: Progress | None = None) -> NDArray[np.float32]:
        """Makes ids the contents: keeps the common prefix, drops what follows it, evaluates what is new.

        Returns the last token's logits (n_vocab,), which is therefore always evaluated. Raises as `eval`
        does.
        """
        tokens = self._checked(ids)
        with self.lock:
            self.require_room(len(tokens))
            self.revision += 1
            kept = self._native.sync(tokens)
            return self._evaluate(tokens[kept:], False, progress, "prefill")

    def rewind(self, n_tokens: int) -> None:
        """Drops every token from position n_tokens on. Raises ArgumentError where it holds fewer."""
        with self.lock:
            if not 0 <= n_tokens <= self.position:
                raise ArgumentError(f"rewind to {n_tokens}: the session holds {self.position} tokens")
            self.revision += 1
            self._native.rewind(n_tokens)

    def abort(self) -> None:
        """From another thread: a running evaluation stops before its next layer and raises AbortedError."""
        self._native.abort()

    def _checked(self, ids: Ids) -> NDArray[np.int32]:
        array = np.asarray(ids)
        if array.ndim != 1 or array.size == 0:
            raise ArgumentError(
                f"token ids: expected at least one, in one dimension, got shape {array.shape}"
            )
        if not np.issubdtype(array.dtype, np.integer):
            raise ArgumentError(f"token ids: expected whole numbers, got {array.dtype}")
        outside = np.flatnonzero((array < 0) | (array >= self.n_vocab))
        if outside.size:
            at = int(outside[0])
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
        logits = np.empty((len(tokens) if all_logits else 1, self.n_vocab), np.float32)
        start, began = self.position, time.perf_counter()
        try:
            for first in range(0, len(tokens), self.n_batch):
                batch = tokens[first : first + self.n_batch]
                last = first + len(batch) == len(tokens)
                rows = logits[first : first + len(batch)] if all_logits else logits[: int(last)]
                part = None if record is None else record.part(first, first + len(batch))
                self._native.eval(batch, rows, part)
                if record is not None and part is not None:
                    record.put(first, part)
                if progress:
                    progress(first + len(batch), len(tokens))
        finally:
            n = self.position - start
            self._tokens[kind] += n
            self._evaluated[str(self._attention)] += n
            self._seconds[kind] += time.perf_counter() - began
        return logits if all_logits else logits[0]

    # ---- attention ----

    @property
    def attention(self) -> Policy:
        """The policy for tokens evaluated from now on; its sinks must be the session's, unless it is
        Dense."""
        return self._attention

    @attention.setter
    def attention(self, policy: Policy) -> None:
        if not isinstance(policy, Policy):
            raise ArgumentError(f"attention: expected a policy such as Adaptive(0.9), got {policy!r}")
        if policy.sinks != self.sinks and not isinstance(policy, Dense):
            raise ArgumentError(
                f"attention: {policy.sinks} sinks, but the session was opened with {self.sinks}"
            )
        with self.lock:
            self._native.set_attention(**policy.native(self._model.info.n_layers, self._model.info.n_heads))
            self._attention = policy

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
