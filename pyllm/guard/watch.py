"""The guard of one session at work: between the session and the native library in every evaluation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm import _native
from pyllm.attention import Dense, Policy
from pyllm.bulk import first_with_bulk
from pyllm.errors import ArgumentError
from pyllm.guard.audit import Audit, audits
from pyllm.guard.controller import Control, Controller
from pyllm.guard.log import DecisionLog
from pyllm.guard.sampling import audit_mask
from pyllm.guard.settings import Guard
from pyllm.guard.tally import Tally
from pyllm.guard.timeline import Stretch, Timeline
from pyllm.record import Record

# Where the logits of positions [first, stop) go, as (n, n_vocab) for the last n of them.
Rows = Callable[[int, int], NDArray[np.float32]]


class Watch:
    """policy: as the session was given it; what the library gets is the policy under control. n_batch: tokens
    evaluated at once. identity: of the model, for the log's header. Not safe for two threads: the session is.
    """

    def __init__(
        self,
        guard: Guard,
        native: _native.NativeSession,
        policy: Policy,
        n_batch: int,
        identity: Mapping[str, Any],
    ) -> None:
        self.guard = guard
        self.tally = Tally.empty(native.info.n_layers, native.info.n_heads)
        self._native, self._n_batch = native, n_batch
        self._demanded: int | None = None
        self._drawn, self._drawn_from = np.zeros(0, bool), -1  # of the control period that begins there
        self._log: DecisionLog | None = None
        self.follow(policy)  # first: a log is not emptied for what is refused
        self._logged_policy = str(policy)
        if guard.log is not None:
            shape = {"n_layers": native.info.n_layers, "n_heads": native.info.n_heads}
            header = {**identity, "policy": self._logged_policy, **shape, "guard": _shown(guard)}
            self._log = DecisionLog(Path(guard.log), header, guard.log_bytes, guard.log_masses)

    def follow(self, policy: Policy) -> None:
        """Watches another policy from here on; control starts over."""
        guard, info = self.guard, self._native.info
        self._policy = str(policy)
        self._controller = Controller(
            policy, info.n_layers, info.n_heads, guard.miss_target, guard.lost_limit
        )
        self._dense = Dense(window=policy.window, sinks=policy.sinks).native(info.n_layers, info.n_heads)
        self._first_bulk = first_with_bulk(policy.window, policy.sinks)
        self._timeline = Timeline(
            guard.control_period,
            self._native.position,
            sys.maxsize if policy.reads_all else self._first_bulk,
            self._start(),
            guard.lost_limit,
        )
        self._applied: Control | dict[str, Any] | None = None  # what the library has; None: something else

    def _start(self) -> Control:
        n_layers, start = self._native.info.n_layers, self.guard.start
        if start and start.shift.shape != (n_layers,):
            raise ArgumentError(
                f"guard: start is control of {start.shift.shape[0]} layers, but the model has {n_layers}"
            )
        return start or Control.none(n_layers)

    @property
    def control(self) -> Control:
        return self._timeline.control

    def thresholds(self) -> NDArray[np.float32]:
        """(n_layers, n_heads) under control; of a policy without thresholds 0, as nothing is decided."""
        found: NDArray[np.float32] | None = self._controller.native(self.control)["thresholds"]
        if found is None:
            return np.zeros((self._native.info.n_layers, self._native.info.n_heads), np.float32)
        return found

    @property
    def page_share(self) -> float:
        """Of prefill, under control; 0 where long heads read everything."""
        settings = self._controller.native(self.control)
        return float(settings["page_share"]) if settings.get("page_bits") else 0.0

    @property
    def verified(self) -> int:
        """Tokens behind which nothing will be repaired any more, if nothing is rewound."""
        return min(self._timeline.clean, self._native.position)

    @property
    def last_repair(self) -> Stretch | None:
        return self._timeline.stretch

    def close(self) -> None:
        """Ends the log, if there is one."""
        if self._log:
            self._log.close()
        self._log = None

    # ---- the timeline ----

    def stop(self, position: int) -> int:
        """Where a batch that begins at position ends at the latest."""
        return self._timeline.boundary(position)

    def rewind(self, n: int) -> int:
        """Follows a rewind to n tokens. Returns how many of these stand; the others are dropped too, and must
        be evaluated again."""
        kept = self._timeline.rewind(n)
        self._native.rewind(kept)
        if self._log:  # last: a full disk must not keep what no longer stands
            self._log.rewind(n)
        return kept

    def pin_repair(self) -> int:
        """Keeps what the latest repair made dense, whatever follows its first token; returns its position."""
        return self._timeline.pin().first

    def demand(self, position: int) -> None:
        """Audits this position, once, when it is evaluated next."""
        self._demanded = position

    # ---- evaluating ----

    def evaluate(self, tokens: NDArray[np.int32], rows: Rows) -> None:
        """Evaluates one batch at the session's position; it does not go beyond `stop` of that.

        Where an audit fails, from the last clean one on everything is evaluated again, densely, before this
        returns; rows are then asked for again. A failure, also of the log, leaves the session where the batch
        began, and one in a repair at the last clean audit.
        """
        first = self._native.position
        stop = first + len(tokens)
        self._timeline.advance(first, self._controller.step)
        self._apply(first)
        record = self._new_record(first, stop)
        before = self._native.layer_stats() if self._log else None
        try:
            self._native.eval(tokens, rows(first, stop), record)
            if record is None:
                return
            if before is not None:
                self._log_tokens(first, record, self._native.layer_stats() - before)
            failed = self._book(audits(record, first, self.guard.promise))
            if failed and self.guard.repair:
                self._repair(failed, stop, rows)
        except BaseException:
            # Ctrl-C may come when the batch is finished already: nothing stays that was not looked at.
            self._native.rewind(self._timeline.rewind(first))
            raise

    def _apply(self, position: int) -> None:
        """Gives the library what holds for `position`."""
        if self._timeline.is_dense(position):
            self._set_dense()
        elif self._applied is not self.control:
            settings = self._controller.native(self.control)
            if self._log:
                self._log_control(self._log, position, settings)
            self._native.set_attention(**settings)
            self._applied = self.control

    def _log_control(self, log: DecisionLog, position: int, settings: Mapping[str, Any]) -> None:
        if self._logged_policy != self._policy:
            log.policy(position, self._policy)
            self._logged_policy = self._policy
        share = settings["page_share"] if settings.get("page_bits") else None
        log.control(position, settings["thresholds"], share)

    def _set_dense(self) -> None:
        if self._applied is not self._dense:
            self._native.set_attention(**self._dense)
            self._applied = self._dense

    def _new_record(self, first: int, stop: int) -> Record | None:
        """For positions [first, stop), None where there is nothing to be seen."""
        if self._timeline.is_dense(first):
            return None
        mask = self._sampled(first, stop)
        if self._demanded is not None and first <= self._demanded < stop:
            mask[self._demanded - first] = True
        mask[: max(0, self._timeline.first_lossy - first)] = False
        if not self._log and not mask.any():
            return None
        return Record.empty(self._native.info.n_layers, self._native.info.n_heads, mask)

    def _book(self, found: list[Audit]) -> Audit | None:
        """Takes audits into account, up to the first that fails; returns that one."""
        for audit in found:
            if audit.position == self._demanded:
                self._demanded = None
                audit = replace(audit, sampled=bool(self._sampled(audit.position, audit.position + 1)[0]))
            failed = not self._timeline.is_clean(audit)
            self._timeline.audits.append(audit)
            if audit.sampled:
                self.tally = self.tally.with_audit(audit, failed)
            if self._log:
                self._log.audit(audit)
            if failed and self.guard.repair:
                return audit
        return None

    def _sampled(self, first: int, stop: int) -> NDArray[np.bool_]:
        """(stop − first,) which of positions [first, stop), of one control period, are drawn for an audit."""
        period = self.guard.control_period
        start = first // period * period
        if start != self._drawn_from:  # a period at once: a token's share of that is cheaper than its own
            self._drawn = audit_mask(start, start + period, self.guard.interval, self.guard.seed)
            self._drawn_from = start
        return self._drawn[first - start : stop - start].copy()

    def _repair(self, failed: Audit, stop: int, rows: Rows) -> None:
        stretch = self._timeline.repair(failed.position)
        if self._log:
            self._log.repair(stretch, failed.worst)
        tokens = self._native.tokens[stretch.first : stop]
        self._native.rewind(stretch.first)
        self._set_dense()
        for at in range(0, len(tokens), self._n_batch):
            part = tokens[at : at + self._n_batch]
            first = stretch.first + at
            self._native.eval(part, rows(first, first + len(part)))
        self.tally = self.tally.with_repair(len(tokens))

    def _log_tokens(self, first: int, record: Record, spent: NDArray[np.uint64]) -> None:
        if self._log:
            has_bulk = first + np.arange(len(record)) >= self._first_bulk
            n_bytes, n_read = (int(n) for n in spent[:, 4:6].sum(axis=0))
            self._log.tokens(first, record, has_bulk, n_bytes, n_read)


def _shown(guard: Guard) -> dict[str, Any]:
    """For the log: the settings that decisions depend on."""
    names = ("audit_rate", "promise", "miss_target", "lost_limit", "repair", "control_period", "seed")
    return {name: getattr(guard, name) for name in names}
