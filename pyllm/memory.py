"""How many bytes of memory this process can still take, so that a refusal comes before an allocation."""

from __future__ import annotations

import re
from pathlib import Path

from pyllm.cgroup import ROOT, group_dirs, read_int


def available_memory(root: Path = ROOT) -> int | None:
    """Bytes: the machine's available memory, or less where a control group leaves less; None if unknown."""
    rooms = [room for group in group_dirs("memory", root) if (room := _room(group)) is not None]
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    if match:
        rooms.append(int(match[1]) * 1024)
    return min(rooms, default=None)


def _room(group: Path) -> int | None:
    """Bytes left below a control group's limit, counting file pages that can be dropped as free."""
    for limit_name, usage_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, usage = read_int(group / limit_name), read_int(group / usage_name)
        if limit is not None and usage is not None:
            return max(0, limit - usage + _inactive_file(group))
    return None


def _inactive_file(group: Path) -> int:
    try:
        statistics = (group / "memory.stat").read_text()
    except OSError:
        return 0
    # v1 counts a group's children in the total_ figures only, v2 in the plain ones.
    found = dict(line.split() for line in statistics.splitlines())
    return int(found.get("total_inactive_file", found.get("inactive_file", 0)))
