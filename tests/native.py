"""The native library with its test hooks, for tests of single functions: `ffi`, `lib` and `check`.

Importing this brings native/build/libpyllm_hooks.so up to date through make. It holds the same objects as the
product's library and exports what native/tests/hooks.h declares besides the public functions. Where
$PYLLM_LIBRARY names another build of it, such as one with sanitizers, that is taken as it is.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path
from typing import Any

import cffi

from pyllm import errors
from pyllm._native import ERRORS, declarations

NATIVE = Path(__file__).parents[1] / "native"
LIBRARY = Path(os.environ.get("PYLLM_LIBRARY") or NATIVE / "build" / "libpyllm_hooks.so")
HEADERS = (NATIVE / "include" / "pyllm.h", NATIVE / "tests" / "hooks.h")


def build(target: str) -> None:
    """Runs make. Test processes started side by side take turns."""
    LIBRARY.parent.mkdir(exist_ok=True)
    with (LIBRARY.parent / "hooks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = ["make", "-C", str(NATIVE), f"-j{os.cpu_count()}", target]
        make = subprocess.run(command, capture_output=True, text=True)
    if make.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{make.stderr[-4000:]}")


def load() -> tuple[Any, Any]:
    """The (ffi, lib) pair. Raises OSError when the library does not load."""
    ffi = cffi.FFI()
    for header in HEADERS:
        ffi.cdef(declarations(header.read_text(encoding="utf-8")))
    return ffi, ffi.dlopen(str(LIBRARY))


is_given = "PYLLM_LIBRARY" in os.environ
if not is_given:
    build("hooks")
ffi, lib = load()


def check(status: int, err: Any = None) -> None:
    """Raises the package's error for a status other than PYLLM_OK; err: `pyllm_error *` or None."""
    if status:
        message = ffi.string(err.message).decode("utf-8", "replace") if err else ""
        raise ERRORS.get(status, errors.PyllmError)(message or f"native status {status}")
