"""The native library with its CUDA backend emulated, and its test hooks: `ffi`, `lib` and `check`.

Importing this brings native/build/libpyllm_emu.so up to date. Beside another build named by $PYLLM_LIBRARY,
such as one with sanitizers, that build's is taken as it is. Where that has none, it is a build for a real
GPU, and the same tests run on that.
"""

from __future__ import annotations

from typing import Any

import cffi

from native import HEADERS, LIBRARY, NATIVE, build, check, declarations, is_given

SIBLING = LIBRARY.with_name("libpyllm_emu.so")
EMULATED = LIBRARY if is_given and not SIBLING.exists() else SIBLING


def load() -> tuple[Any, Any]:
    """The (ffi, lib) pair. Raises OSError when the library does not load."""
    emulator = cffi.FFI()
    for header in (*HEADERS, NATIVE / "tests" / "hooks_emu.h"):
        emulator.cdef(declarations(header.read_text(encoding="utf-8")))
    return emulator, emulator.dlopen(str(EMULATED))


if not is_given:
    build("emu")
ffi, lib = load()

GIGABYTE = 10**9
# False where a build for a real GPU was given.
is_emulated = hasattr(lib, "hook_emu_memory")


def set_memory(n_bytes: int) -> None:
    """Of the emulated GPU; a real one has what it has."""
    if is_emulated:
        lib.hook_emu_memory(n_bytes)


def fail_next(call: str, error: int, times: int = 1) -> None:
    """The next calls of a function of CUDA fail with this number of cudaError_t; only emulated."""
    lib.hook_emu_fail(call.encode(), error, times)


def reset() -> None:
    """A GPU of 4 GB, of which nothing is to fail."""
    set_memory(4 * GIGABYTE)
    if is_emulated:
        fail_next("", 0, 0)


__all__ = ["GIGABYTE", "check", "fail_next", "ffi", "is_emulated", "lib", "reset", "set_memory"]
