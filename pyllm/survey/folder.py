"""The documents of a folder, measured in tokens; what cannot be read is listed with its cause."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyllm import documents
from pyllm.errors import DocumentError, FileError, PyllmError
from pyllm.files import shown

# (files done, files in all)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Document:
    """path: within the folder. size: of the file in bytes. tokens: of its text."""

    path: Path
    size: int
    tokens: int


@dataclass(frozen=True)
class Unreadable:
    path: Path
    cause: str


@dataclass(frozen=True)
class Folder:
    """Documents and unreadable files, each in the order of their paths; at least one document."""

    root: Path
    documents: list[Document]
    unreadable: list[Unreadable]


def survey(root: Path, count: Callable[[str], int], progress: Progress | None = None) -> Folder:
    """Reads every file under a folder; count: how many tokens a text is.

    What begins with a dot is left out. Raises FileError where the folder cannot be listed, DocumentError
    where there is no document in it.
    """
    paths, unreadable = _walk(root)
    found: list[Document] = []
    for i, path in enumerate(paths):
        try:
            found.append(_document(root, path, count))
        except (PyllmError, OSError) as error:
            unreadable.append(Unreadable(path, _cause(root / path, error)))
        if progress:
            progress(i + 1, len(paths))
    unreadable.sort(key=lambda one: one.path)
    if not found:
        raise DocumentError(_no_document(root, unreadable))
    return Folder(root, found, unreadable)


def _document(root: Path, path: Path, count: Callable[[str], int]) -> Document:
    # A pipe would wait for ever.
    if (root / path).exists() and not (root / path).is_file():
        raise DocumentError("neither a file nor a folder")
    text = documents.read(root / path)
    return Document(path, (root / path).stat().st_size, count(text))


def _walk(root: Path) -> tuple[list[Path], list[Unreadable]]:
    """Paths of files within root, in order, and the folders that cannot be listed or are not followed."""
    try:
        os.listdir(root)
    except OSError as error:
        raise FileError(f"{root}: cannot be listed: {error.strerror or error}") from None
    paths: list[Path] = []
    unreadable: list[Unreadable] = []

    def on_error(error: OSError) -> None:
        unreadable.append(Unreadable(Path(error.filename).relative_to(root), _cause(root, error)))

    for name, folders, files in os.walk(root, onerror=on_error):
        here = Path(name).relative_to(root)
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for folder in folders:
            if (root / here / folder).is_symlink():
                unreadable.append(Unreadable(here / folder, "a link to a folder, which is not followed"))
        paths += (here / file for file in sorted(files) if not file.startswith("."))
    return paths, unreadable


def _cause(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, PyllmError):
        return f"cannot be read: {error.strerror or error}"
    return str(error).removeprefix(f"{path}: ")


def _no_document(root: Path, unreadable: list[Unreadable]) -> str:
    if not unreadable:
        return f"{root}: there is no file in this folder"
    first = unreadable[0]
    return (
        f"{root}: none of its {len(unreadable)} files is a document that can be read; the first is "
        f"{shown(first.path)}: {first.cause}"
    )
