"""A standalone runtime for quantized GGUF models with adaptive sparse attention."""

from pyllm.attention import Adaptive, Dense, Oracle, Static, Window
from pyllm.calibration import Calibration
from pyllm.errors import (
    AbortedError,
    ArgumentError,
    ContextError,
    DeviceError,
    DocumentError,
    DownloadError,
    FileError,
    FormatError,
    InsufficientMemoryError,
    NumericError,
    PyllmError,
    TemplateError,
    UnsupportedError,
)
from pyllm.guard import Guard
from pyllm.llm import LLM
from pyllm.profile import Profile
from pyllm.record import Record
from pyllm.session import Session

__all__ = [
    "LLM",
    "AbortedError",
    "Adaptive",
    "ArgumentError",
    "Calibration",
    "ContextError",
    "Dense",
    "DeviceError",
    "DocumentError",
    "DownloadError",
    "FileError",
    "FormatError",
    "Guard",
    "InsufficientMemoryError",
    "NumericError",
    "Oracle",
    "Profile",
    "PyllmError",
    "Record",
    "Session",
    "Static",
    "TemplateError",
    "UnsupportedError",
    "Window",
]
