"""The CPUs this process may use: their kinds, and how many by affinity mask and control groups' quota."""

from __future__ import annotations

import math
import os
from pathlib import Path

from pyllm.cgroup import ROOT, group_dirs, read_int

# Instruction sets the native library has kernels for, each needing all before it.
ISAS = ("generic", "avx2", "avx512", "avx512vnni", "avx512bf16")

MAX_THREADS = 256  # of the native library


def default_threads() -> int:
    """One for each CPU that this process may use, as far as the native library goes."""
    return min(available_cpus(), MAX_THREADS)


def available_cpus(root: Path = ROOT) -> int:
    """CPUs of the affinity mask, or the CPU quota rounded up where that is less; at least 1."""
    quotas = [quota for group in group_dirs("cpu", root) if (quota := _quota(group)) is not None]
    return max(1, min([len(os.sched_getaffinity(0)), *(math.ceil(quota) for quota in quotas)]))


def _quota(group: Path) -> float | None:
    """CPUs' worth of time per period that a control group may use; None where it is not limited."""
    try:
        quota, period = (group / "cpu.max").read_text().split()  # v2: "150000 100000" or "max 100000"
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    v1_quota, v1_period = read_int(group / "cpu.cfs_quota_us"), read_int(group / "cpu.cfs_period_us")
    return v1_quota / v1_period if v1_quota and v1_period and v1_quota > 0 else None
