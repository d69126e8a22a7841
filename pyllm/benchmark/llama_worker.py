"""A process that keeps llama.cpp's model open and measures what it is told to.

Run as a file, by a Python that has llama-cpp-python and need not have pyllm: `llama_worker.py OPTIONS`,
OPTIONS being llama_cpp.Llama's arguments as JSON. Reads one JSON array per line, [method, arguments...], and
answers each with a line {"result": ...} or {"error": "..."}; ends with its input.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import sys
import time
from typing import IO, Any


class LlamaEngine:
    """The counterpart of `pyllm.benchmark.engine.Engine`."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._api = importlib.import_module("llama_cpp")
        self._options = options
        self._ids: list[int] = []
        self._before = _status_bytes("VmRSS")
        self._first_open_seconds = self._open()

    def _open(self) -> float:
        started = time.perf_counter()
        self._llama = self._api.Llama(verbose=False, logits_all=False, **self._options)
        return time.perf_counter() - started

    def info(self) -> dict[str, Any]:
        return {
            "version": self._api.__version__,
            "system": self._api.llama_print_system_info().decode(),
            "n_vocab": self._llama.n_vocab(),
            "first_open_seconds": self._first_open_seconds,
        }

    def memory(self) -> dict[str, int]:
        return {"before": self._before, "peak": _status_bytes("VmHWM")}

    def open(self) -> float:
        self._llama.close()
        del self._llama
        gc.collect()
        return self._open()

    def use(self, ids: list[int]) -> None:
        self._ids = ids

    def prefill(self, n: int) -> float:
        self._llama.n_tokens = 0
        return self._eval([self._ids[:n]])

    def decode(self, depth: int, n: int) -> float:
        # The next eval drops what the cache holds from n_tokens on.
        self._llama.n_tokens = min(self._llama.n_tokens, max(0, depth - 1))
        if depth:
            self._eval([self._ids[self._llama.n_tokens : depth]])
        return self._eval([[token] for token in self._ids[depth : depth + n]])

    def _eval(self, pieces: list[list[int]]) -> float:
        started = time.perf_counter()
        for piece in pieces:
            self._llama.eval(piece)
        self._api.llama_synchronize(self._llama.ctx)
        return time.perf_counter() - started


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as status:
        match = re.search(rf"^{name}:\s+(\d+) kB", status.read(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def serve(engine: LlamaEngine, commands: IO[str], answers: IO[str]) -> None:
    for line in commands:
        method, *arguments = json.loads(line)
        answer(answers, {"result": getattr(engine, method)(*arguments)})


def answer(answers: IO[str], message: dict[str, Any]) -> None:
    print(json.dumps(message), file=answers, flush=True)


def main() -> None:
    # What the native library prints must not join the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        serve(LlamaEngine(json.loads(sys.argv[1])), sys.stdin, answers)
    except Exception as error:
        answer(answers, {"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
