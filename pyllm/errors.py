"""The package's own exceptions: every failure a caller can act on is a `PyllmError`."""

from __future__ import annotations


class PyllmError(Exception):
    """Base of all errors raised on purpose by pyllm; its text is one sentence for people."""


class ArgumentError(PyllmError, ValueError):
    """The caller's mistake: a token id out of range, an empty prompt, a bad threshold."""


class FileError(PyllmError, OSError):
    """A file that cannot be opened, mapped, read or written."""


class FormatError(PyllmError, ValueError):
    """A file whose bytes contradict themselves, the format or the architecture."""


class UnsupportedError(PyllmError):
    """Well-formed, but of an architecture, type or version pyllm does not know."""


class ContextError(PyllmError, ValueError):
    """More tokens than the context holds."""


class InsufficientMemoryError(PyllmError, MemoryError):
    """Not enough memory: found by an estimate beforehand, or refused by the system."""


class AbortedError(PyllmError):
    """The evaluation was stopped on request; the session stays usable."""


class NumericError(PyllmError, ArithmeticError):
    """NaN or infinity in weights or results."""


class DeviceError(PyllmError):
    """A GPU, its driver or the library for it: not there, or failed. The CPU stays usable."""


class DownloadError(PyllmError, OSError):
    """A model that could not be fetched, or whose checksum is wrong."""


class DocumentError(PyllmError, ValueError):
    """A document that cannot be turned into text."""


class TemplateError(PyllmError, ValueError):
    """A chat template that is missing, broken, or refuses the messages."""
