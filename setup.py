"""Builds the native library by its own Makefile and tags the wheel by platform; the rest: pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def build_native() -> None:
    """Runs `make -C native cpu`, which writes pyllm/_lib. Raises SystemExit with one line when it cannot."""
    for tool in ("make", os.environ.get("CC", "gcc")):
        if shutil.which(tool) is None:
            raise SystemExit(
                f"error: pyllm needs make and a C compiler to build its native library, and '{tool}' is not "
                "installed (Debian, Ubuntu: apt install build-essential)"
            )
    jobs = len(os.sched_getaffinity(0))
    result = subprocess.run(["make", "-C", str(ROOT / "native"), f"-j{jobs}", "cpu"])
    if result.returncode != 0:
        raise SystemExit("error: 'make -C native cpu' failed; the compiler's message is above")


class BuildNative(build_py):
    def run(self) -> None:
        build_native()
        super().run()


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3, this platform: the library is loaded by cffi at run time and uses no CPython API."""
        return "py3", "none", super().get_tag()[2]


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        """True, so that the files go where platform-specific packages go."""
        return True


setup(cmdclass={"build_py": BuildNative, "bdist_wheel": PlatformWheel}, distclass=NativeDistribution)
