"""What scripts/device_check runs on a machine with a GPU: steps with time limits, all into one report.

A step that fails is reported and the next one goes on; the exit status is 1 then. The report is written anew
with every result, so that whatever ends this program leaves what was known.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as Type

from tiny_models import write_tiny

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "native"
# The library of the tests with the CUDA library beside it, and no emulated one.
GPU_BUILD = NATIVE / "build" / "gpu"
SUITE = (
    *(f"tests/test_cuda_{name}.py" for name in ("rows", "linear", "attention", "forward")),
    "tests/test_rest.py",
)
GOLDEN = "tests/test_golden.py"  # with the default model, where that has been downloaded
TOOLS = ("memcheck", "racecheck", "synccheck")
HEAD_DIMS = (128, 80, 256)
AT_ONCE = 4


def lines(command: list[str], seconds: float, **environment: str) -> Iterator[str]:
    """Its output, as it comes. Raises RuntimeError, with the end of it, where it fails or takes longer."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    seconds = max(1.0, seconds)
    late = threading.Timer(seconds, end_group, (process,))
    late.start()
    seen: deque[str] = deque(maxlen=50)
    try:
        for line in process.stdout or ():
            seen.append(line)
            yield line
        status = process.wait()
    finally:
        late.cancel()
        end_group(process)
    if status:
        reason = f"was ended after {seconds:.0f} s" if status == -signal.SIGKILL else "failed"
        raise RuntimeError(f"{' '.join(command)} {reason}: {''.join(seen)[-2000:]}")


def end_group(process: subprocess.Popen[str]) -> None:
    """Ends a process and what it started; where it has ended already, nothing is."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def run(command: list[str], seconds: float, **environment: str) -> str:
    return "".join(lines(command, seconds, **environment)).strip()


def last_line(command: list[str], seconds: float, **environment: str) -> dict[str, str]:
    """Of its output, or how it failed."""
    try:
        return {"result": run(command, seconds, **environment).splitlines()[-1]}
    except RuntimeError as error:
        return {"failed": str(error)}


def device(seconds: float) -> Iterator[dict[str, str]]:
    fields = ("name", "compute_cap", "memory.total", "driver_version")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    yield dict(zip(fields, run(query, seconds).split(", "), strict=True))


def build(seconds: float) -> Iterator[dict[str, str]]:
    architecture = next(device(seconds))["compute_cap"].replace(".", "")
    make = ["make", "-s", "-C", str(NATIVE), f"-j{os.cpu_count()}", f"ARCHS={architecture}"]
    run([*make, "cpu", "hooks", "cuda", "bench_cuda"], seconds)
    GPU_BUILD.mkdir(parents=True, exist_ok=True)
    shutil.copy(NATIVE / "build" / "libpyllm_hooks.so", GPU_BUILD)
    shutil.copy(ROOT / "pyllm" / "_lib" / "libpyllm_cuda.so", GPU_BUILD)
    yield {"architecture": f"sm_{architecture}"}


def ceilings(seconds: float) -> Iterator[dict[str, Any]]:
    yield json.loads(run([str(NATIVE / "build" / "bench" / "bench_cuda")], seconds))


def suite(seconds: float) -> Iterator[dict[str, str]]:
    """A process per file: an illegal address ends a process's use of the GPU. What failed is run again with
    every launch waited for, which names the kernel."""
    end = time.monotonic() + seconds
    library = {"PYLLM_LIBRARY": str(GPU_BUILD / "libpyllm_hooks.so")}
    with_model = [GOLDEN] if any((ROOT / "models").glob("SmolLM2*.gguf")) else []
    for file in [*SUITE, *with_model]:
        tests = [sys.executable, "-m", "pytest", "-q", file, *(["-k", "cuda"] if file == GOLDEN else [])]
        row = last_line(tests, end - time.monotonic(), **library)
        yield {"file": file} | row
        if "failed" in row:
            again = last_line(tests, end - time.monotonic(), CUDA_LAUNCH_BLOCKING="1", **library)
            yield {"file": file, "launches": "waited for"} | again


SANITIZED = """
import sys
import numpy as np
from pyllm import LLM, Adaptive, Calibration
for kv in ("gpu", "split"):
    attention = Adaptive(0.6, window=64, page_bits=3)
    llm = LLM(sys.argv[1], device="cuda", kv=kv, attention=attention)
    session, info = llm.session(), llm.info
    n_layers, d = info.n_layers, info.head_dim
    shapes = [(info.n_heads, 3), *((info.n_kv_heads, *rest) for rest in ((d,), (d, d), (d,), (d,), (d,)))]
    calibration = Calibration(*(np.zeros((n_layers, *shape)) for shape in shapes), (0, 1))
    session.eval(list(range(300)))
    for token in range(8):
        session.eval([token])
    pages = {"page_bits": "graded", "decode_share": 0.1, "calibration": calibration}
    # The second: lists cut by what they drop; what stands for pages in several parts.
    for drop, n_more in ((1.0, 0), (0.05, 2300 if d == 128 else 0)):
        session.attention = Adaptive(0.6, window=64, page_drop=drop, **pages)
        if n_more:
            session.eval([i % info.n_vocab for i in range(n_more)])
        for token in range(8):
            session.eval([token])
"""


def sanitizer(seconds: float) -> Iterator[dict[str, Any]]:
    """compute-sanitizer's tools on both caches, for heads of several sizes; several at once."""
    if not shutil.which("compute-sanitizer"):
        yield {"result": "compute-sanitizer is not installed"}
        return
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        for head_dim in HEAD_DIMS:
            path = Path(folder) / f"{head_dim}.gguf"
            write_tiny(path, n_heads=16, head_dim=head_dim, types=Type.Q4_K, tokenizer=True, sharp=4.0)

        def row(tool: str, head_dim: int) -> dict[str, Any]:
            checked = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c"]
            model = str(Path(folder) / f"{head_dim}.gguf")
            return {"tool": tool, "head_dim": head_dim} | last_line(
                [*checked, SANITIZED, model], end - time.monotonic()
            )

        yield from pool.map(row, *zip(*itertools.product(TOOLS, HEAD_DIMS), strict=True))


def rows_of(program: str, seconds: float, **environment: str) -> Iterator[dict[str, Any]]:
    """Ends by itself in time, but for what a last row may take longer than was foreseen."""
    command = [sys.executable, program, str(seconds - 20)]
    yield from (json.loads(line) for line in lines(command, seconds, **environment) if line.startswith("{"))


def stages(seconds: float) -> Iterator[dict[str, Any]]:
    yield from rows_of("tests/device_stages.py", seconds, PYLLM_LIBRARY=str(GPU_BUILD / "libpyllm_hooks.so"))


def speed(seconds: float) -> Iterator[dict[str, Any]]:
    yield from rows_of("tests/device_speed.py", seconds)


STEPS: dict[str, tuple[Callable[[float], Iterator[dict[str, Any]]], float]] = {
    "device": (device, 20),
    "build": (build, 120),
    "ceilings": (ceilings, 20),
    "suite": (suite, 70),
    "sanitizer": (sanitizer, 80),
    "stages": (stages, 60),
    "speed": (speed, 150),
}


def results(step: Callable[[float], Iterator[dict[str, Any]]], seconds: float) -> Iterator[dict[str, Any]]:
    """A step's, and its failure as the last of them."""
    try:
        yield from step(seconds)
    except Exception as error:  # the report is what this program is for
        yield {"failed": str(error)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, default=Path("device_check.json"))
    parser.add_argument("--seconds", type=float, default=460, help="in all (default: %(default)s)")
    parser.add_argument("--started", type=float, default=time.time(), help="when they began (default: now)")
    args = parser.parse_args()
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the first GPU is nvidia-smi's first
    end = time.monotonic() + args.seconds - (time.time() - args.started)
    report: dict[str, list[dict[str, Any]]] = {name: [] for name in STEPS}
    for name, (step, most) in STEPS.items():
        for result in results(step, min(most, end - time.monotonic())):
            print(f"{name}: {json.dumps(result)}", flush=True)
            report[name].append(result)
            args.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any("failed" in result for rows in report.values() for result in rows))


if __name__ == "__main__":
    sys.exit(main())
