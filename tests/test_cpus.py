"""CPUs and memory the process may use, from real affinity masks and from control group files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyllm.cpus import available_cpus
from pyllm.memory import available_memory

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    """A file system root with the given control files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.fixture
def wide_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen CPUs, so that the quota decides on any machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


@pytest.mark.usefixtures("wide_affinity")
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 16),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "210000 100000"}, 3),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "1000 100000"}, 1),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "nonsense"}, 16),
        # the limit of a group above binds too
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/cpu.max": "300000 100000",
                "sys/fs/cgroup/a/b/x": "",
            },
            3,
        ),
        # the host's path, not visible inside the container
        ({"proc/self/cgroup": "0::/docker/1f", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/job\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "50000",
            },
            5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            16,
        ),
    ],
)
def test_quota_caps_the_cpus(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert available_cpus(write(tmp_path, files)) == expected


def test_affinity_caps_the_cpus() -> None:
    """One CPU in the mask of a real process is one CPU."""
    cpu = min(os.sched_getaffinity(0))
    code = f"import os, pyllm.cpus as c; os.sched_setaffinity(0, {{{cpu}}}); print(c.available_cpus())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "1\n"


def test_this_machine() -> None:
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)
    memory = available_memory()
    assert memory is not None
    assert 0 < memory <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


MEMINFO = {"proc/meminfo": f"MemTotal: {9 * GIB // 1024} kB\nMemAvailable:   {8 * GIB // 1024} kB"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (MEMINFO, 8 * GIB),
        ({}, None),
        (
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/",
                "sys/fs/cgroup/memory.max": str(3 * GIB),
                "sys/fs/cgroup/memory.current": str(2 * GIB),
                "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GIB // 2}",
            },
            3 * GIB // 2,
        ),
        (
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/",
                "sys/fs/cgroup/memory.max": "max",
                "sys/fs/cgroup/memory.current": "5",
            },
            8 * GIB,
        ),
        (
            {
                **MEMINFO,
                "proc/self/cgroup": "3:memory:/job",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(GIB),
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": str(GIB + 4096),
            },
            0,
        ),
    ],
)
def test_control_group_caps_the_memory(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    assert available_memory(write(tmp_path, files)) == expected
