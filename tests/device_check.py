"""What scripts/device_check runs on a machine with a GPU: steps with time limits, all into one report.

A step that fails is reported and the next one goes on; the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type

from pyllm import LLM, Adaptive, Dense, InsufficientMemoryError, Session, Window
from pyllm.attention import Policy
from tiny_models import write_tiny

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "native"
# The library of the tests with the CUDA library beside it, and no emulated one.
GPU_BUILD = NATIVE / "build" / "gpu"
NATIVE_TESTS = tuple(f"tests/test_cuda_{name}.py" for name in ("rows", "linear", "attention", "forward"))

# Llama 3 8B; about Q4_K_M, which has Q6_K in half the layers' attn_v and ffn_down.
SHAPE = {
    "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "dim": 4096, "n_ff": 14336,
    "n_vocab": 128256, "n_ctx_train": 132_096,
}  # fmt: skip
TYPES = {"output": Type.Q6_K, "attn_v": Type.Q6_K, "token_embd": Type.Q4_K, "*": Type.Q4_K}
DEPTHS = (0, 8_000, 32_000, 128_000)
N_PREFILL, N_DECODE = 512, 32

# Local rates of random weights say nothing; these thresholds make all heads long, and all local.
POLICIES: dict[str, Policy] = {
    "dense": Dense(),
    "all long": Adaptive(1.1),
    "all local": Adaptive(0.0),
    "pages": Adaptive(1.1, page_bits=3, page_share=0.01),
}


def run(command: list[str], seconds: float, **environment: str) -> str:
    """Its output. Raises RuntimeError with the end of it where it fails."""
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, timeout=max(1.0, seconds), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stdout[-2000:]}")
    return done.stdout


def device(seconds: float) -> dict[str, str]:
    fields = ("name", "compute_cap", "memory.total", "driver_version")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    return dict(zip(fields, run(query, seconds).strip().split(", "), strict=True))


def build(seconds: float) -> str:
    architecture = device(seconds)["compute_cap"].replace(".", "")
    make = ["make", "-s", "-C", str(NATIVE), f"-j{os.cpu_count()}", f"ARCHS={architecture}"]
    run([*make, "cpu", "hooks", "cuda"], seconds)
    GPU_BUILD.mkdir(parents=True, exist_ok=True)
    shutil.copy(NATIVE / "build" / "libpyllm_hooks.so", GPU_BUILD)
    shutil.copy(ROOT / "pyllm" / "_lib" / "libpyllm_cuda.so", GPU_BUILD)
    return f"sm_{architecture}"


def suite(seconds: float) -> str:
    tests = [sys.executable, "-m", "pytest", "-q", "-x", *NATIVE_TESTS]
    return run(tests, seconds, PYLLM_LIBRARY=str(GPU_BUILD / "libpyllm_hooks.so")).strip().splitlines()[-1]


def sanitizer(seconds: float) -> str:
    if not shutil.which("compute-sanitizer"):
        return "compute-sanitizer is not installed"
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny(Path(folder) / "tiny.gguf", types=Type.Q4_K, tokenizer=True, sharp=4.0)
        program = (
            f"from pyllm import LLM, Adaptive\n"
            f"for kv in ('gpu', 'split'):\n"
            f"  a = Adaptive(0.6, window=64, page_bits=3)\n"
            f"  s = LLM({str(path)!r}, device='cuda', kv=kv, attention=a).session()\n"
            f"  s.eval(list(range(300)))\n"
            f"  for t in range(8): s.eval([t])\n"
        )
        checked = ["compute-sanitizer", "--error-exitcode", "9", sys.executable, "-c", program]
        return run(checked, seconds).strip().splitlines()[-1]


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def largest_session(llm: LLM) -> Session:
    """For the greatest depth whose KV cache fits."""
    for depth in reversed(DEPTHS[1:]):
        with contextlib.suppress(InsufficientMemoryError):
            return llm.session(n_ctx=depth + N_PREFILL + N_DECODE)
    return llm.session(n_ctx=N_PREFILL + N_DECODE)


def speed(seconds: float) -> list[dict[str, Any]]:
    """Tokens per second of every policy at every depth that time allows, the cache on the GPU and split."""
    end = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "synthetic-8b.gguf"
        write_tiny(path, types=TYPES, tied=False, tokenizer=True, same_layers=True, **SHAPE)  # type: ignore[arg-type]
        llm = LLM(path, device="cuda", attention=Adaptive())
        for llm.kv in ("gpu", "split"):
            left = end - time.monotonic()
            speed_of(llm, end if llm.kv == "split" else time.monotonic() + left * 0.6, rows)
    return rows


def speed_of(llm: LLM, end: float, rows: list[dict[str, Any]]) -> None:
    session = largest_session(llm)
    ids = np.random.default_rng(0).integers(0, llm.info.n_vocab, session.n_ctx)
    for depth in (depth for depth in DEPTHS if depth + N_PREFILL + N_DECODE <= session.n_ctx):
        while session.position < depth and time.monotonic() < end:
            session.attention = Window()  # of random weights it does not matter what the cache holds
            session.eval(ids[session.position : min(depth, session.position + 4 * N_PREFILL)])
        for name, policy in POLICIES.items():
            if session.position < depth or time.monotonic() > end:
                break
            session.attention = policy
            session.eval(ids[depth : depth + 2])  # moments and sketches catch up
            session.rewind(depth)
            prefill = timed(lambda: session.eval(ids[-N_PREFILL:]))
            session.eval(ids[:1])  # kernels are loaded and
            session.eval(ids[1:2])  # a token's graph is written
            decode = timed(lambda: [session.eval([int(t)]) for t in ids[2:N_DECODE]])
            session.rewind(depth)
            row = {
                "kv": llm.kv,
                "depth": depth,
                "attention": name,
                "prefill_tokens_per_second": N_PREFILL / prefill,
                "decode_tokens_per_second": (N_DECODE - 2) / decode,
            }
            rows.append(row)


STEPS: dict[str, tuple[Callable[[float], Any], float]] = {
    "device": (device, 20),
    "build": (build, 120),
    "suite": (suite, 60),
    "sanitizer": (sanitizer, 60),
    "speed": (speed, 200),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, default=Path("device_check.json"))
    parser.add_argument("--seconds", type=float, default=460, help="in all (default: %(default)s)")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    report: dict[str, Any] = {}
    failed = False
    for name, (step, most) in STEPS.items():
        print(f"{name} ...", flush=True)
        try:
            report[name] = step(min(most, end - time.monotonic()))
        except Exception as error:  # the report is what this program is for
            report[name] = {"failed": str(error)}
            failed = True
        print(json.dumps(report[name], indent=1), flush=True)
        args.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
