"""Models for the tests: the real default one, and a tiny random one with a tokenizer and a chat template."""

from __future__ import annotations

import secrets
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pyllm import LLM
from pyllm.errors import FileError
from pyllm.models import DEFAULT_MODEL, resolve
from tiny_models import write_tiny

# A shell that starts the suite in the background makes it ignore Ctrl-C, and its children with it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


SEED = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """One seed for everything that is drawn, of which hypothesis' own option gives a fixed one."""
    given = config.getoption("--hypothesis-seed")
    config.stash[SEED] = secrets.randbelow(2**32) if given is None else zlib.crc32(str(given).encode())


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed of this run's random inputs: {config.stash[SEED]} (fixed by --hypothesis-seed)"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """This test's own random numbers."""
    return np.random.default_rng([request.config.stash[SEED], zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's file. scripts/test fetches it."""
    try:
        return resolve(DEFAULT_MODEL)[0]
    except FileError as error:
        pytest.fail(f"{error} (scripts/test does it)")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights; what it says is noise, but the same noise every time."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf", tokenizer=True, sharp=4.0)


@pytest.fixture
def tiny(tiny_model: Path) -> LLM:
    return LLM(tiny_model)


@pytest.fixture
def emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package runs on the library whose CUDA backend is emulated, a GPU of 4 GB."""
    from emulated import ffi, lib, reset  # builds it: only where it is needed

    monkeypatch.setattr("pyllm._native.loading.loaded", lambda: (ffi, lib))
    reset()
    yield
    reset()
