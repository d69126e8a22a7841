"""The native library through cffi: declared from its own header; handles, and status → exception.

Nothing here knows text, policies or sampling defaults. Calls release the GIL. Handles are freed with their
last reference, in any order: the library itself keeps a session's model open, and a model's file.
"""

from pyllm._native.file import File, Tensor
from pyllm._native.loading import ERRORS, check, declarations, library
from pyllm._native.model import DeviceInfo, Model, ModelInfo, device_info
from pyllm._native.sampling import sample
from pyllm._native.session import (
    KV_TYPES,
    NativeSession,
    SessionMemory,
    SessionParams,
    check_record,
    session_memory,
)

__all__ = [
    "ERRORS",
    "KV_TYPES",
    "DeviceInfo",
    "File",
    "Model",
    "ModelInfo",
    "NativeSession",
    "SessionMemory",
    "SessionParams",
    "Tensor",
    "check",
    "check_record",
    "declarations",
    "device_info",
    "library",
    "sample",
    "session_memory",
]
