"""Files by their name and their content."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

CHUNK = 1 << 20  # bytes read and hashed at once


def shown(path: str | os.PathLike[str]) -> str:
    """A path that any terminal and file can take: bytes that are no UTF-8 and control characters replaced."""
    text = os.fsencode(path).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def file_sha256(path: Path) -> str:
    """In hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
