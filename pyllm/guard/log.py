"""The decision log: JSON lines, one kind of thing each, in a file that cannot outgrow its bound.

    {"pyllm_log": 1, "model", "fingerprint", "policy", "n_layers", "n_heads", "guard"}
        the header
    {"control": t, "threshold", "page_share"}
        thresholds from position t on, per layer or per layer and head
    {"tokens": t, "n", "local", "bytes", "read"}
        n tokens from position t on: per token the hexadecimal bits of (layer, head), 1 for local, the first
        one highest, or "" without a bulk; bulk bytes of dense attention and bytes read; with masses also "L"
        and "M", (n_layers, n, n_heads): L and the estimate of the bulk mass. A batch that may be too long for
        the file is several of these, the first with the bytes of all
    {"audit": t, "missed", "page_missed", "lost"}
        bits as above; lost shares (n_layers, n_heads)
    {"repair": t, "first", "stop", "lost"}
        because of the audit at t, [first, stop) became dense; nothing else is said of these tokens
    {"rewind": n}
        only the first n tokens are left
    {"policy": t, "name"}
        from position t on another policy; its control follows

When the file has half of the bytes that are allowed, it becomes FILE.1, in place of the one before, and a new
one begins with a header of the policy that holds.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.errors import ArgumentError, FileError
from pyllm.guard.audit import Audit
from pyllm.guard.timeline import Stretch
from pyllm.record import Record

VERSION = 1
MARK = b'{"pyllm_log":'  # what a log begins with
NUMBER = 30  # bytes of a number in nested lists, at most
NAMES = 1024  # bytes of names and single numbers in a header, a control and one more entry, at most


class DecisionLog:
    """Writes one session's log; only one at a time writes a file.

    path: replaced if it exists, like the one before it. header: what the first line says besides the version,
    n_layers and n_heads among it. limit: bytes, of both files. masses: with every token's. Raises
    ArgumentError where half the limit may be too little for one entry, and FileError where one of the files
    is something else than a log, or, as every method does, where the file cannot be written or another
    session writes it; it then ends with the last whole line.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], limit: int, masses: bool) -> None:
        self._path, self._limit, self._masses = path, limit, masses
        self._older = path.with_name(path.name + ".1")
        self._header = {"pyllm_log": VERSION, **header}
        self._control: dict[str, Any] | None = None
        self._at_once = self._tokens_at_once(header["n_layers"] * header["n_heads"])
        with self._naming_the_file():
            for existing in (path, self._older):
                if existing.is_file():
                    _require_log(existing)
            self._file, self._size = self._opened(), 0
            self._append(b"")

    def _tokens_at_once(self, n_pairs: int) -> int:
        """How many tokens' entry fits into a file behind its beginning, and every other entry does too."""
        beginning = len(_line(self._header)) + NAMES + NUMBER * n_pairs
        token = n_pairs // 4 + 8 + (2 * NUMBER * n_pairs if self._masses else 0)
        audit = NUMBER * n_pairs + n_pairs
        least = 2 * (beginning + max(token, audit))
        if self._limit < least:
            masses = " and their masses" if self._masses else ""
            raise ArgumentError(
                f"log_bytes: expected at least {least} for the decisions of {n_pairs} heads{masses}, "
                f"got {self._limit}"
            )
        return (self._limit // 2 - beginning) // token

    def _opened(self) -> FileIO:
        """The file, empty. Unbuffered: what could not be written must not be written later."""
        file = self._path.open("ab", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
        except BaseException:
            file.close()
            raise
        return file

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except FileError:
            raise
        except BlockingIOError:
            raise FileError(f"{self._path}: another session is writing its decision log there") from None
        except OSError as error:
            cause = error.strerror or error
            raise FileError(f"{self._path}: the decision log could not be written: {cause}") from None

    def _write(self, entry: dict[str, Any]) -> None:
        line = _line(entry)
        with self._naming_the_file():
            if self._size + len(line) > self._limit // 2:
                os.replace(self._path, self._older)
                older, self._file, self._size = self._file, self._opened(), 0
                older.close()
            self._append(line)

    def _append(self, line: bytes) -> None:
        """Whole or not at all, behind the beginning where the file is empty."""
        rest = memoryview(line if self._size else self._beginning() + line)
        size = self._size + len(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException:
            self._file.truncate(self._size)
            raise
        self._size = size

    def _beginning(self) -> bytes:
        return _line(self._header) + (_line(self._control) if self._control else b"")

    def policy(self, position: int, name: str) -> None:
        self._header, self._control = {**self._header, "policy": name}, None
        self._write({"policy": position, "name": name})

    def control(
        self, position: int, thresholds: NDArray[np.float32] | None, page_share: float | None
    ) -> None:
        """thresholds: (n_layers, n_heads). page_share: None without a page tier."""
        shown = None
        if thresholds is not None:
            same = bool((thresholds == thresholds[:, :1]).all())
            shown = _rounded(thresholds[:, 0] if same else thresholds)
        self._control = {"control": position, "threshold": shown, "page_share": page_share}
        self._write(self._control)

    def tokens(
        self, position: int, record: Record, has_bulk: NDArray[np.bool_], n_bytes: int, n_read: int
    ) -> None:
        """The record's tokens, from position on. has_bulk: (n,) bool. n_bytes, n_read: of their bulks."""
        local = [bits(~record.is_long[:, i]) if has_bulk[i] else "" for i in range(len(record))]
        for at in range(0, len(record), self._at_once):
            part = slice(at, at + self._at_once)
            entry = {"tokens": position + at, "n": len(local[part]), "local": local[part]}
            entry |= {"bytes": n_bytes, "read": n_read} if at == 0 else {"bytes": 0, "read": 0}
            if self._masses:
                masses = {"L": record.local_mass, "M": record.estimate}
                entry |= {name: _rounded(mass[:, part]) for name, mass in masses.items()}
            self._write(entry)

    def audit(self, audit: Audit) -> None:
        missed, page_missed = bits(audit.missed), bits(audit.page_missed)
        lost = _rounded(audit.lost)
        entry = {"audit": audit.position, "missed": missed, "page_missed": page_missed, "lost": lost}
        self._write(entry if audit.sampled else {**entry, "sampled": False})

    def repair(self, stretch: Stretch, lost: float) -> None:
        at = {"first": stretch.first, "stop": stretch.stop}
        self._write({"repair": stretch.cause, **at, "lost": round(lost, 4)})

    def rewind(self, n: int) -> None:
        self._write({"rewind": n})

    def close(self) -> None:
        self._file.close()


def _require_log(path: Path) -> None:
    """Or a file with nothing in it."""
    with path.open("rb") as file:
        if not MARK.startswith(file.read(len(MARK))):
            raise FileError(
                f"{path}: not a decision log, and not overwritten: choose another file for the log"
            )


def bits(x: NDArray[np.bool_]) -> str:
    """Hexadecimal, the first of x.ravel() in the highest bit; the last digit filled with zeros."""
    return np.packbits(x).tobytes().hex()


def _rounded(x: NDArray[np.float32]) -> Any:
    """As nested lists, with what is no number as null."""
    rounded = np.round(x.astype(np.float64), 4).astype(object)
    rounded[np.isnan(x)] = None
    return rounded.tolist()


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
