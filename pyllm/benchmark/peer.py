"""llama.cpp as a thing to measure: a worker process in an environment of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.benchmark.engine import Sample
from pyllm.errors import PyllmError

WORKER = Path(__file__).parent / "llama_worker.py"


class Peer:
    """Starts the worker with `python`, which must have llama-cpp-python. A context manager that ends it.

    ids: the tokens that its measurements evaluate. Raises PyllmError where llama.cpp fails.
    """

    def __init__(
        self, python: str, name: str, model: Path, ids: NDArray[np.int32], n_vocab: int, **options: Any
    ) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (close)
        pipe = subprocess.PIPE
        command = [python, str(WORKER), json.dumps({"model_path": str(model), **options})]
        try:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, start_new_session=True
            )
        except OSError as error:
            raise PyllmError(f"{python}: cannot be run: {error.strerror}") from None
        try:
            self.info = self._call("info")
            if self.info["n_vocab"] != n_vocab:
                raise PyllmError(f"{name} reads {self.info['n_vocab']} tokens in {model}, pyllm {n_vocab}")
            self._call("use", ids.tolist())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, in the middle of what it does if need be."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def prefill(self, n: int) -> Sample:
        return Sample(self._call("prefill", n))

    def decode(self, depth: int, n: int) -> Sample:
        return Sample(self._call("decode", depth, n))

    def open(self) -> float:
        return float(self._call("open"))

    def memory(self) -> dict[str, int]:
        memory: dict[str, int] = self._call("memory")
        return memory

    def _call(self, *command: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise PyllmError(f"{self.name}: its process ended: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PyllmError(f"{self.name}: {answer['error']}")
        return answer["result"]

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "without a word")
