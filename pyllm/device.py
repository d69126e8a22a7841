"""Where a model runs: the CPU, or a GPU whose memory is asked for before anything is loaded onto it."""

from __future__ import annotations

import contextlib
import re
from typing import Any

from rich.filesize import decimal

from pyllm import _native
from pyllm.errors import ArgumentError, DeviceError, InsufficientMemoryError
from pyllm.memory import available_memory

# A GPU gives memory out in such units to whatever is larger than half of one.
UNIT = 2 << 20
# Kept free of a GPU's memory: kernels as they are loaded, their stacks and graphs take some, and so does the
# last unit of each of a session's arrays.
RESERVE = 256 << 20


def choose(device: str, file: _native.File) -> str:
    """The device that a model from this file is opened on: "cpu", "cuda" or "cuda:N".

    "auto" is "cuda" where a GPU is there whose free memory holds the weights, and otherwise the CPU.
    Raises ArgumentError for other names, DeviceError where a GPU asked for cannot be used, and
    InsufficientMemoryError where the weights do not fit, with the numbers.
    """
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise ArgumentError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    if device == "auto":
        with contextlib.suppress(DeviceError, InsufficientMemoryError):
            require_weights("cuda", file)
            return "cuda"
        device = "cpu"
    require_weights(device, file)
    return device


def require_weights(device: str, file: _native.File) -> None:
    """Raises InsufficientMemoryError where the file's weights do not fit into the device's free memory."""
    needed, available = _weights(device, file), available_on(device)
    if available is None or needed <= available:
        return
    fits = f"; the weights of {_layers_within(available, file)} would fit" if device != "cpu" else ""
    raise InsufficientMemoryError(
        f"{file.paths[0]}: the model needs {decimal(needed)} of {memory_of(device)}, but only "
        f"{decimal(available)} is available{fits}"
    )


def available_on(device: str) -> int | None:
    """Bytes of memory that can still be taken on a device; None if unknown. Raises DeviceError."""
    if device == "cpu":
        return available_memory()
    return max(0, _native.device_info(device).free_bytes - RESERVE)


def memory_of(device: str) -> str:
    """What its memory is called in messages."""
    return "memory" if device == "cpu" else f"memory on {device} ({_native.device_info(device).name})"


def _weights(device: str, file: _native.File) -> int:
    """Bytes that a file's weights take; on a GPU each matrix leaves half a unit unused, on average."""
    needed = _native.Model.memory(file)
    if device == "cpu":
        return needed
    return needed + UNIT // 2 * sum(tensor.size > UNIT // 2 for tensor in file.tensors())


def _layers_within(available: int, file: _native.File) -> str:
    """How many layers' weights would fit beside those that belong to none, as "3 of 32 layers"."""
    layers: dict[Any, int] = {}
    for tensor in file.tensors():
        match = re.match(r"blk\.(\d+)\.", tensor.name)
        layer = int(match[1]) if match else None
        layers[layer] = layers.get(layer, 0) + tensor.size
    room = available - layers.pop(None, 0)
    n = 0
    for layer in sorted(layers):
        room -= layers[layer]
        if room < 0:
            break
        n += 1
    return f"{n} of {len(layers)} layers"
