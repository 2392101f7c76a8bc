"""Builds the extension with CMake, and the page of a package index. Everything else is in pyproject.toml."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def jobs() -> int:
    """Compilers that run at once: MAX_JOBS, or as many as this process has cores."""
    if limit := os.environ.get("MAX_JOBS"):
        return int(limit)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class CMakeBuild(build_ext):
    """Runs CMakeLists.txt and leaves distil_kernels/_C where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build_dir), "-DCMAKE_BUILD_TYPE=Release",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-DPYTHON_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        # A build directory remembers its generator; choosing another one there is an error.
        if shutil.which("ninja") and not (build_dir / "CMakeCache.txt").exists():
            configure += ["-G", "Ninja"]
        subprocess.check_call(configure)
        # CMake itself reads CMAKE_BUILD_PARALLEL_LEVEL where no number is given.
        parallel = [] if "CMAKE_BUILD_PARALLEL_LEVEL" in os.environ else ["--parallel", str(jobs())]
        subprocess.check_call(["cmake", "--build", str(build_dir), *parallel])


def index_page(readme: str) -> str:
    """README without its pictures and links into the repository, which an index does not have."""
    without_pictures = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\s*", "", readme)
    return re.sub(r"\[([^]]*)\]\((?!https?:|#)[^)]*\)", r"\1", without_pictures)


setup(
    ext_modules=[Extension("distil_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    long_description=index_page((ROOT / "README.md").read_text()),
    long_description_content_type="text/markdown",
)
