"""CMakeLists.txt with stand-ins for nvcc (one that cannot compile leaves its back end out and says why); warnings."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")]


def configure(folder: Path, *options: str) -> tuple[str, str]:
    """What CMake prints, and the commands that it would build with."""
    import pybind11

    command = [
        "cmake", "-S", ROOT, "-B", folder, "-G", "Unix Makefiles", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-DPYTHON_EXECUTABLE={sys.executable}",
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *options,
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout, (folder / "compile_commands.json").read_text()


def stand_in(folder: Path, version: str) -> str:
    """An nvcc that knows its version, and fails with the words of one that does not accept the host compiler."""
    path = folder / "nvcc"
    path.write_text(f"""#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release {version}, V{version}.89"; exit 0;; esac
echo '#error -- unsupported GNU version! "gcc"; later than 12 are not supported' >&2
exit 1
""")
    path.chmod(0o755)
    return f"-DDISTIL_NVCC={path}"


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("11.5", "nvcc is of CUDA 11.5, it takes 11.8 or later"),
        ("12.4", "nvcc fails: error -- unsupported GNU version! gcc later than 12 are not supported"),
    ],
)
def test_an_nvcc_that_cannot_compile_leaves_the_back_end_out(version, reason, tmp_path):
    output, commands = configure(tmp_path / "build", stand_in(tmp_path, version))
    assert f"distil_kernels: the cuda back end is left out: {reason}" in output
    assert reason.split("(")[0] in commands, "the extension does not know why"
    assert "row_kernels.cpp" in commands and "row_kernels.cu" not in commands.replace("row_kernels.cpp", "")


def test_without_nvcc(tmp_path):
    output, commands = configure(tmp_path, "-DDISTIL_NVCC=DISTIL_NVCC-NOTFOUND", "-DDISTIL_CUDA=OFF")
    assert "it was built with DISTIL_CUDA=OFF" in output and "DISTIL_CUDA_MISSING" in commands


def test_a_new_nvcc_compiles_for_every_architecture(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    if "release 13" not in version:
        pytest.skip("an nvcc before 12.8 knows fewer")
    _, commands = configure(tmp_path, f"-DDISTIL_NVCC={nvcc}")
    kernels = next(line for line in commands.splitlines() if '"command"' in line and "row_kernels.cu" in line)
    cluster = next(line for line in commands.splitlines() if '"command"' in line and "row_cluster.cu" in line)
    assert [name for name in ("80", "90", "100", "120") if f"sm_{name}" in kernels] == ["80", "90", "100", "120"]
    assert "sm_80" not in cluster and "sm_90" in cluster and "compute_120" in cluster


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("source", ["dispatch.cpp", "row_kernels.cpp", "sparse_kernels.cpp"])
def test_no_warnings(source):
    command = ["g++", "-std=c++17", "-fsyntax-only", "-fopenmp", "-DDISTIL_ISA=portable", "-Wall", "-Wextra",
               "-Wconversion", "-Werror", ROOT / "csrc" / "cpu" / source]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
