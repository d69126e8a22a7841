"""A decision log read back and summed up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.errors import FileError, FormatError, UnsupportedError
from pyllm.guard.audit import Audit
from pyllm.guard.log import VERSION
from pyllm.guard.tally import Tally

MOST_HEADS = 2**16  # of all layers; the largest models have a quarter of them


@dataclass
class LogSummary:
    """What a log says. Tokens evaluated again after a rewind count again.

    header: the first line. n_tokens: evaluated under the policy, not densely for a repair; n_bulk: of these
    with a bulk; local: (n_layers, n_heads) how often of these. n_bytes, n_read: of their bulks. tally: of the
    audits. controls: (position, thresholds (n_layers,) or (n_layers, n_heads) or None, page_share or None),
    each holding from there on. repairs: (cause, first, stop, lost share). rewinds: how many. policies:
    (position, name), each from there on, after that of the header. cut_off: the last line has no end, as
    where its writer was stopped, and counts for nothing.
    """

    header: dict[str, Any]
    tally: Tally
    local: NDArray[np.int64]
    n_tokens: int = 0
    n_bulk: int = 0
    n_bytes: int = 0
    n_read: int = 0
    rewinds: int = 0
    controls: list[tuple[int, NDArray[np.float64] | None, float | None]] = field(default_factory=list)
    repairs: list[tuple[int, int, int, float]] = field(default_factory=list)
    policies: list[tuple[int, str]] = field(default_factory=list)
    cut_off: bool = False

    @classmethod
    def of(cls, path: Path) -> LogSummary:
        """Raises FileError where the file cannot be read; FormatError, naming file and line, where it is no
        decision log or damaged; UnsupportedError for a version unknown here."""
        lines = _lines(path)
        _, first = next(lines, (1, b"{}"))
        summary = cls._begin(path, _entry(path, 1, first))
        for number, line in lines:
            if not line.endswith(b"\n"):
                summary.cut_off = True
                break
            entry = _entry(path, number, line)
            try:
                summary._add(entry)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise FormatError(f"{path}: line {number}: {_cause(error)}") from None
        return summary

    @classmethod
    def _begin(cls, path: Path, header: dict[str, Any]) -> LogSummary:
        version = header.get("pyllm_log")
        if version is None:
            raise FormatError(f"{path}: line 1: no decision log: it does not begin with a header")
        if version != VERSION:
            raise UnsupportedError(
                f"{path}: line 1: decision log of version {version!r}, this pyllm reads {VERSION}"
            )
        shape = header.get("n_layers"), header.get("n_heads")
        if not _is_shape(shape):
            raise FormatError(f"{path}: line 1: n_layers and n_heads are {shape}")
        if not isinstance(header.get("guard", {}), dict):
            raise FormatError(f"{path}: line 1: guard is {header['guard']!r}, expected its settings")
        tally = Tally.empty(header["n_layers"], header["n_heads"])
        return cls(header, tally, np.zeros_like(tally.local))

    def _add(self, entry: dict[str, Any]) -> None:
        kinds: dict[str, Callable[[dict[str, Any]], None]] = {
            "tokens": self._add_tokens,
            "audit": self._add_audit,
            "control": self._add_control,
            "repair": self._add_repair,
            "rewind": self._add_rewind,
            "policy": self._add_policy,
        }
        kind = next(iter(entry), "")
        if kind not in kinds:
            raise ValueError(f"unknown entry {kind!r}")
        _whole(entry, kind)
        kinds[kind](entry)

    def _add_tokens(self, entry: dict[str, Any]) -> None:
        n, local = _whole(entry, "n"), entry["local"]
        if not isinstance(local, list) or len(local) != n:
            raise ValueError(f"decisions for other than {n} tokens")
        decided = [self._bits(x) for x in local if x]
        self.local = self.local + np.sum(decided, axis=0, dtype=np.int64) if decided else self.local
        self.n_tokens += n
        self.n_bulk += len(decided)
        self.n_bytes += _whole(entry, "bytes")
        self.n_read += _whole(entry, "read")

    def _add_audit(self, entry: dict[str, Any]) -> None:
        lost = _numbers(entry["lost"], [self.local.shape])
        if ((lost < 0) | (lost > 1)).any():
            raise ValueError("lost shares outside 0..1")
        missed, page_missed = self._bits(entry["missed"]), self._bits(entry["page_missed"])
        sampled = entry.get("sampled", True)
        if not isinstance(sampled, bool):
            raise ValueError(f"sampled: {sampled!r}")
        audit = Audit(entry["audit"], missed, missed, page_missed, lost.astype(np.float32), sampled)
        if sampled:
            self.tally = self.tally.with_audit(audit, over_limit=False)

    def _add_control(self, entry: dict[str, Any]) -> None:
        thresholds, share = entry["threshold"], entry["page_share"]
        if thresholds is not None:
            thresholds = _numbers(thresholds, [self.local.shape, self.local.shape[:1]])
        self.controls.append(
            (entry["control"], thresholds, None if share is None else _share(entry, "page_share"))
        )

    def _add_repair(self, entry: dict[str, Any]) -> None:
        first, stop = _whole(entry, "first"), _whole(entry, "stop")
        self.repairs.append((entry["repair"], first, stop, _share(entry, "lost")))

    def _add_rewind(self, entry: dict[str, Any]) -> None:
        self.rewinds += 1

    def _add_policy(self, entry: dict[str, Any]) -> None:
        self.policies.append((entry["policy"], str(entry["name"])))

    def _bits(self, text: str) -> NDArray[np.bool_]:
        """What `log.bits` wrote, (n_layers, n_heads)."""
        data = np.frombuffer(bytes.fromhex(text), np.uint8)
        if len(data) != -(-self.local.size // 8):
            raise ValueError(f"{len(data)} bytes of decisions for {self.local.size} heads")
        return np.unpackbits(data, count=self.local.size).reshape(self.local.shape).astype(bool)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of every line."""
    try:
        with path.open("rb") as file:
            yield from enumerate(file, 1)
    except OSError as error:
        raise FileError(f"{path}: the log could not be read: {error.strerror or error}") from None


def _entry(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line, parse_constant=_refused)
    except (ValueError, RecursionError):
        raise FormatError(f"{path}: line {number}: not JSON") from None
    if not isinstance(entry, dict):
        raise FormatError(f"{path}: line {number}: expected a JSON object")
    return entry


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _is_shape(shape: tuple[Any, ...]) -> bool:
    """Of a model: also what a summary of so many heads holds has its bound."""
    whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 < n <= MOST_HEADS for n in shape)
    return whole and math.prod(shape) <= MOST_HEADS


def _share(entry: dict[str, Any], name: str) -> float:
    value = entry[name]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}, expected a share, 0 to 1")
    return float(value)


def _whole(entry: dict[str, Any], name: str) -> int:
    value = entry[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"{name} is {value!r}, expected a whole number")
    return value


def _numbers(values: Any, shapes: list[tuple[int, ...]]) -> NDArray[np.float64]:
    array = np.array(values, np.float64)
    if array.shape not in shapes or not np.isfinite(array).all():
        raise ValueError(f"numbers of shape {array.shape}, expected {shapes[0]}")
    return array


def _cause(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
