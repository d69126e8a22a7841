"""The limits that a container or service manager puts on this process, read from its control groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def group_dirs(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """Directories whose limits bind this process: its own group and every group above it.

    `controller` ("cpu", "memory") chooses the hierarchy of cgroup v1; the one of v2 holds all. `root` is the
    file system's root, another one in tests.
    """
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / controller, root / "sys/fs/cgroup" / controllers]
        else:
            continue
        for mount in mounts:
            # In a container the path may be the host's, not visible there: the mount itself is the group.
            group = mount / path.lstrip("/")
            yield from (d for d in (group, *group.parents) if d.is_relative_to(mount) and d.is_dir())


def read_int(path: Path) -> int | None:
    """The number in a control file; None where it is absent or says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
