"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path


def _umask() -> int:
    """Reading the process's mask means setting it, which other threads would see: so from /proc."""
    try:
        status = Path("/proc/self/status").read_text("ascii", "replace")
        return int(status.split("Umask:")[1].split()[0], 8)
    except (OSError, IndexError, ValueError):
        return 0o077


def _mode(path: Path) -> int:
    """As open() would leave it: of the file that is there, or by the mask."""
    return stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask()


def write(path: Path, data: memoryview) -> None:
    """Replaces `path` by data: until the end it is what it was. Raises OSError, and leaves nothing behind.

    A link stays one, to the new file; a device or a pipe is refused, which a file in its place would break.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "there is something else than a file at this place", str(path))
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), _mode(path))
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
