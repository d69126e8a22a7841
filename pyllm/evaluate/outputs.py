"""Files that a command writes: refused before the work where they could not be written after it."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pyllm import atomic_file
from pyllm.errors import ArgumentError, FileError, UnsupportedError

IMAGES = ("png", "svg", "pdf")


def write(path: Path, data: bytes) -> None:
    """Raises FileError."""
    try:
        atomic_file.write(path, memoryview(data))
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}") from None


def csv_bytes(rows: Iterable[Any], kind: type) -> bytes:
    """One line per row under the names of the fields of `kind`, a dataclass; None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return text.getvalue().encode()


def require_outputs(files: Mapping[str, Path | None]) -> None:
    """files: by the options that name them, None where one is not given.

    Raises FileError as `require_writable`, and ArgumentError as `require_apart`.
    """
    for path in filter(None, files.values()):
        require_writable(path)
    require_apart(files)


def require_plot(path: Path | None) -> None:
    """Raises ArgumentError where a path's ending names no kind of image, and UnsupportedError where nothing
    could draw one."""
    if path is None:
        return
    if path.suffix[1:].lower() not in IMAGES:
        raise ArgumentError(f"--plot {path}: expected a name that ends in .{', .'.join(IMAGES)}")
    require_matplotlib()


def require_matplotlib() -> None:
    """Raises UnsupportedError where it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnsupportedError("plots need matplotlib: pip install 'pyllm[eval]'") from None


def require_writable(path: Path) -> None:
    """Raises FileError where a file could not be written in the end, before the work is done."""
    # A link is followed: the file that it leads to is the one that is replaced.
    place = Path(os.path.realpath(path))
    try:
        if place.is_dir():
            raise FileError(f"{path}: cannot be written: it is a directory")
        if place.exists() and not place.is_file():
            raise FileError(f"{path}: cannot be written: it is a pipe or a device")
        with tempfile.NamedTemporaryFile(dir=place.parent, prefix=f".{place.name}."):
            pass
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}") from None


def require_apart(files: Mapping[str, Path | None]) -> None:
    """Raises ArgumentError where two are the same file, of which the first to be written would be lost."""
    seen: dict[str, str] = {}
    for name, path in files.items():
        if path and (other := seen.setdefault(os.path.realpath(path), name)) != name:
            raise ArgumentError(f"{other} and {name} are the same file, {path}: name another")
