"""What this machine can do at most, measured by the programs of native/bench where those are built."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllm.benchmark.stages import Stage
from pyllm.errors import PyllmError

PROGRAMS = Path(__file__).parents[2] / "native" / "build" / "bench"


@dataclass(frozen=True)
class Ceilings:
    """memory_gb_s: GB/s read by all threads. gmac_s: G multiply-adds per second by arithmetic ("int8", "f32",
    "bf16" where there is such). kernels: what the library's kernels reach alone, as bench_ops gives it."""

    memory_gb_s: float
    gmac_s: dict[str, float]
    kernels: list[dict[str, Any]]

    def floor(self, stage: Stage) -> float:
        """Seconds that a stage takes at least: its bytes at the memory's speed or its multiply-adds at the
        processor's, whichever is longer."""
        reading = stage.bytes / (self.memory_gb_s * 1e9)
        return max(reading, stage.multiply_adds / (self.gmac_s[stage.arithmetic] * 1e9))


def measure(n_threads: int, *, seconds: float | None = None, programs: Path = PROGRAMS) -> Ceilings | None:
    """None where the programs are not built. seconds: of one measurement, by default the programs' own."""
    if not all((programs / name).exists() for name in ("bench_mem", "bench_ops")):
        return None
    options = ["--json", "--threads", str(n_threads), *(["--seconds", str(seconds)] if seconds else [])]
    memory, ops = (_run(programs / name, options) for name in ("bench_mem", "bench_ops"))
    return Ceilings(memory["threads"][-1]["best_gb_s"], ops["peaks"], ops["kernels"])


def _run(program: Path, options: list[str]) -> Any:
    result = subprocess.run([str(program), *options], capture_output=True, text=True)
    if result.returncode:
        raise PyllmError(f"{program} failed with status {result.returncode}: {result.stderr.strip()}")
    return json.loads(result.stdout)
