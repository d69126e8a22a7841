"""Dataclasses from what JSON holds: every field is of the type that its annotation says."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def checked(kind: type[T], values: Any) -> T:
    """An instance with these fields. Raises ValueError for one that is missing, unknown, of another type or
    not finite."""
    if not isinstance(values, dict):
        raise ValueError(f"expected an object, got {values!r:.80}")
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"there is no {name!r}")
        if not is_of(hints[name], value):
            expected = getattr(hints[name], "__name__", hints[name])
            raise ValueError(f"{name}: expected {expected}, got {value!r:.80}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(str(error)) from None


def each(what: str, read: Callable[[Any], T], values: Iterable[Any]) -> list[T]:
    """All of them read. Raises ValueError that tells which one cannot be, the first being 1."""
    found = []
    for number, value in enumerate(values, 1):
        try:
            found.append(read(value))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{what} {number}: {error}") from None
    return found


def is_of(hint: Any, value: Any) -> bool:
    """Whether a value is of an annotated type: numbers are finite, and whole ones pass for others."""
    if get_origin(hint) in (list, tuple):
        return isinstance(value, get_origin(hint)) and all(is_of(get_args(hint)[0], item) for item in value)
    if get_args(hint):  # X | Y
        return any(is_of(one, value) for one in get_args(hint))
    if hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        return type(value) in kinds and -sys.float_info.max <= value <= sys.float_info.max
    return isinstance(value, hint)
