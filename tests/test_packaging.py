"""The source distribution builds a wheel and holds its tests; the wheel runs where there is no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CORE = ["tests/test_losses.py", "tests/engine/test_checks.py", "-k", "checks or test_loss_and_gradients"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")]


def run(*command: str | Path, **options: Any) -> str:
    options.setdefault("env", {name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    completed = subprocess.run(command, capture_output=True, text=True, **options)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("distributions")
    # The requirements are this environment's: isolated, they would be fetched again.
    command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", folder, ROOT]
    run(*command, env=os.environ | {"CMAKE_ARGS": "-DDISTIL_CUDA=OFF"})
    return folder


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory) -> Path:
    """The Python of a fresh environment with the wheel, and with torch and pytest from this one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder)
    python = folder / "bin" / "python"
    (wheel,) = distributions.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # What a .pth file adds comes after the environment's own packages, and editable installations there are not seen.
    others = [path for path in sys.path if path.endswith("-packages")]
    Path(packages, "torch_and_pytest.pth").write_text("\n".join(others))
    return python


def test_the_wheel_runs_without_a_compiler(installed, tmp_path):
    program = """
import torch, distil_kernels
hidden, weight = torch.randn(8, 16, requires_grad=True), torch.randn(64, 16)
loss = distil_kernels.fused_forward_ce(hidden, weight, torch.randn(8, 16), weight, backend="cpu")
loss.backward()
print(distil_kernels.__file__, distil_kernels.__version__)
"""
    path, version = run(installed, "-c", program, env={"PATH": ""}, cwd=tmp_path).split()
    assert Path(path).is_relative_to(installed.parents[1])
    assert version in next(iter((installed.parents[1]).rglob("distil_kernels-*.dist-info"))).name


def test_the_wheel_has_what_the_trainer_reads(installed):
    package = next(iter(installed.parents[1].rglob("distil_kernels/train")))
    missing = [
        path.relative_to(ROOT)
        for path in (ROOT / "distil_kernels").rglob("*")
        if path.suffix in (".py", ".pyi", ".jinja", ".jsonl", ".typed")
        and not (package.parents[1] / path.relative_to(ROOT)).exists()
    ]
    assert not missing


def test_the_tests_of_the_source_distribution_pass(installed, distributions, tmp_path):
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(tmp_path)
    (folder,) = tmp_path.iterdir()
    # The folder itself is not on the path, so that the installed package is tested.
    program = "import sys, pytest; sys.path.remove(''); sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "pythonpath=tests tests/train"]
    run(installed, "-c", program, *options, *CORE, cwd=folder)


def test_the_page_of_an_index_has_no_link_into_the_repository(distributions):
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith("/METADATA"))
        metadata = files.read(name).decode()
    assert "# distil_kernels" in metadata and "](docs/" not in metadata and "](examples/" not in metadata
