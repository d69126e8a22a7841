"""One run at a time on a file that it goes on from."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyllm.errors import FileError


@contextmanager
def alone(path: Path | None) -> Iterator[None]:
    """Keeps other runs from `path`; None: nothing to keep. A run that was killed keeps nobody.

    The lock is a file beside it, for `path` itself is replaced. Raises FileError where another run has it.
    """
    if path is None:
        yield
        return
    place = Path(os.path.realpath(path))
    lock = place.with_name(f".{place.name}.lock")
    try:
        held = _locked(lock)
    except BlockingIOError:
        raise FileError(f"{path}: another run is writing it; wait until that one has finished") from None
    except OSError as error:
        raise FileError(f"{lock}: cannot be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(held)


def _locked(lock: Path) -> int:
    """A descriptor of the locked file, which is the one that stands there: its holder before may have removed
    the one that was opened here."""
    while True:
        held = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.path.samestat(os.fstat(held), lock.stat()):
                return held
        except BaseException:
            os.close(held)
            raise
        os.close(held)
