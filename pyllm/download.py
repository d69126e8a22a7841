"""One file over HTTP: resumed where it stopped, checked, and only then given its name."""

from __future__ import annotations

import errno
import fcntl
import http.client
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pyllm.errors import DownloadError
from pyllm.files import file_sha256

Progress = Callable[
    [int, int | None], None
]  # (bytes done, bytes in all or None where the server does not say)

CHUNK = 1 << 20  # bytes read and written at once
TIMEOUT = 30  # seconds without a byte from the server
ATTEMPTS = 5  # connections in a row that may break without bringing a byte


class RefusedError(DownloadError):
    """The server could not be reached or refused: other credentials or another way might help."""


@dataclass(frozen=True)
class Source:
    """What to fetch, and what is known about it beforehand."""

    url: str
    size: int | None = None  # bytes
    sha256: str | None = None  # lower-case hex
    secret_headers: Mapping[str, str] = field(
        default_factory=dict
    )  # not sent on to another host by a redirect


def no_progress(done: int, total: int | None) -> None:
    """A `Progress` that shows nothing."""


def check_file(path: Path, size: int | None, sha256: str | None) -> None:
    """Raises DownloadError where the file's size or checksum is not the expected one."""
    actual = path.stat().st_size
    if size is not None and actual != size:
        raise DownloadError(f"{path}: {actual:,} bytes instead of {size:,}")
    if sha256 is not None and (found := file_sha256(path)) != sha256.lower():
        raise DownloadError(f"{path}: sha256 is {found} instead of {sha256.lower()}")


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """`path`.part, open to append, locked; it stays when something fails. OSError becomes DownloadError."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                yield file
            finally:
                if file.tell() == 0:  # nothing to go on from
                    part.unlink(missing_ok=True)
                    _validator(part).unlink(missing_ok=True)
    except DownloadError:
        raise
    except BlockingIOError:
        raise DownloadError(
            f"{part}: another download is writing it; wait until that one has finished"
        ) from None
    except OSError as error:
        free = "; free some space and run it again to go on" if error.errno == errno.ENOSPC else ""
        raise DownloadError(f"{part}: cannot be written: {error.strerror or error}{free}") from error


def require_space(directory: Path, size: int) -> None:
    """Raises DownloadError where `directory`'s disk cannot take `size` bytes more."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise DownloadError(f"{directory}: the disk has {free:,} bytes free, and {size:,} more are needed")


def fetch(source: Source, path: Path, on_progress: Progress = no_progress) -> None:
    """Downloads to `path`, going on from a part left by an earlier attempt; the name appears only at the end.

    Raises DownloadError (RefusedError for no connection); the part is kept unless its checksum is wrong.
    """
    with writing(path) as file:
        total = _transfer(source, file, on_progress)
        file.flush()
        part = Path(file.name)
        try:
            check_file(part, total, source.sha256)
        except DownloadError as error:
            _empty(file)
            raise DownloadError(f"{error}; what {source.url} sent was thrown away") from None
        part.replace(path)
        _validator(part).unlink(missing_ok=True)


def _transfer(source: Source, file: BinaryIO, on_progress: Progress) -> int | None:
    """Appends what is missing, reconnecting while connections bring something. Returns the whole's size."""
    failures = 0
    while True:
        before = file.tell()
        try:
            total = _receive(source, file, on_progress)
            if total is None or file.tell() >= total:
                return total
            cause = "the connection was closed"
        except (http.client.HTTPException, ConnectionError) as error:
            cause = str(error) or type(error).__name__
        failures = 0 if file.tell() > before else failures + 1
        if failures == ATTEMPTS:
            raise DownloadError(
                f"{source.url}: stopped after {file.tell():,} bytes: {cause}; "
                f"they are kept in {file.name}, run it again to go on"
            )


def _receive(source: Source, file: BinaryIO, on_progress: Progress) -> int | None:
    """One connection. Returns the size of the whole where it is known; `file` may still be shorter."""
    if source.size is not None and file.tell() == source.size:
        return source.size
    with _connect(source, file) as response:
        if response.status != 206:
            # From the start: nothing was there, the server knows no ranges, or its file has changed.
            _empty(file)
        done = file.tell()
        total = _total(source, response, done)
        _remember(response, Path(file.name))
        if total is not None:
            require_space(Path(file.name).parent, total - done)
        on_progress(done, total)
        for chunk in _chunks(response):
            file.write(chunk)
            done += len(chunk)
            on_progress(done, total)
    return total


def _chunks(response: Any) -> Iterator[bytes]:
    """What the server sends; every way in which a connection breaks is a ConnectionError."""
    try:
        while chunk := response.read(CHUNK):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(str(error) or type(error).__name__) from error


def _connect(source: Source, file: BinaryIO) -> Any:
    done, validator = file.tell(), _validator(Path(file.name))
    request = urllib.request.Request(
        source.url, headers={"User-Agent": "pyllm", "Accept-Encoding": "identity"}
    )
    for name, value in source.secret_headers.items():
        request.add_unredirected_header(name, value)
    if done and validator.exists():
        request.add_header("If-Range", validator.read_text())
    if done and (validator.exists() or source.sha256):
        request.add_header("Range", f"bytes={done}-")
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # the part is as long as the server's file, or longer
            _empty(file)
            return _connect(source, file)
        raise RefusedError(f"{source.url}: the server answered {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise RefusedError(f"{source.url}: no connection: {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:  # accepted, but not answered
        raise ConnectionError(str(error) or type(error).__name__) from error


def _total(source: Source, response: Any, done: int) -> int | None:
    """Size of the whole file; raises DownloadError where the server contradicts itself or what is known."""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if not match or int(match[1]) != done:
            raise DownloadError(f"{source.url}: the server answered a request for bytes {done}- with others")
        total: int | None = int(match[2])
    else:
        length = response.headers.get("Content-Length")
        total = int(length) if length and length.isdecimal() else None
    if source.size is not None and total is not None and total != source.size:
        raise DownloadError(f"{source.url}: the server has {total:,} bytes instead of {source.size:,}")
    return source.size if total is None else total


def _validator(part: Path) -> Path:
    """Beside the part: the ETag it was begun with, so that no other file is glued to its beginning."""
    return part.with_name(part.name + ".etag")


def _remember(response: Any, part: Path) -> None:
    etag = response.headers.get("ETag", "")
    if etag and not etag.startswith("W/"):
        _validator(part).write_text(etag)
    else:
        _validator(part).unlink(missing_ok=True)


def _empty(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()
    _validator(Path(file.name)).unlink(missing_ok=True)
