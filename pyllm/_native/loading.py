"""The library itself: found, loaded and declared once; status → exception."""

from __future__ import annotations

import functools
import os
import re
import threading
from pathlib import Path
from typing import Any

import cffi

from pyllm import errors

FOLDER = Path(__file__).parents[1] / "_lib"
LIBRARY = FOLDER / "libpyllm.so"
HEADER = FOLDER / "pyllm.h"

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


# What one cffi.FFI made, another does not take: two threads must not both be the first to load.
LOADING = threading.Lock()


def library() -> tuple[Any, Any]:
    """The (ffi, lib) pair, loaded once. $PYLLM_LIBRARY names another build, such as one with sanitizers.

    Raises FileError when the library is not built or does not load.
    """
    return loaded()


@functools.cache
def loaded() -> tuple[Any, Any]:
    with LOADING:
        return _load()


@functools.cache
def _load() -> tuple[Any, Any]:
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
