"""The first seconds of the command line: what is imported when, and Ctrl-C before there is a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HOOK = """
import os, signal, sys

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("INTERRUPTED_IMPORT"):
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
"""


def start(tmp_path: Path, *arguments: str, interrupted: str = "") -> subprocess.CompletedProcess[str]:
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    environment = os.environ | {"PYTHONPATH": path, "INTERRUPTED_IMPORT": interrupted}
    command = [sys.executable, "-m", "distil_kernels.train", *arguments]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("interrupted", ["yaml", "distil_kernels.train.config", "torch", "transformers", "accelerate"])
def test_ctrl_c_while_modules_are_imported_is_quiet(tmp_path: Path, interrupted: str) -> None:
    process = start(tmp_path, "--model", "nowhere", interrupted=interrupted)
    assert process.returncode in (-2, 130), process.stderr
    assert process.stderr in ("", "stopped at once; a run directory is as of its last checkpoint\n")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], 0), (["--learning_rte", "1"], 2), (["--steps", "-1"], 2), (["report", "."], 2)],
)
def test_options_are_read_without_torch(tmp_path: Path, arguments: list[str], status: int) -> None:
    """An import of torch would be interrupted."""
    process = start(tmp_path, *arguments, interrupted="torch")
    assert process.returncode == status, process.stderr
