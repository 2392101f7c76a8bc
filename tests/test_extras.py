"""Programs in an environment that lacks their extra: one line with the command that installs it, and status 2."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from distil_kernels.extras import EXTRAS, missing_package

ROOT = Path(__file__).parents[1]
HIDDEN = sorted(frozenset({"datasets", "tokenizers", "triton"}).union(*EXTRAS.values()) - {"jinja2", "numpy"})
"""Without those that torch may bring along."""
RUN = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({HIDDEN!r}))  # as if it were not installed
sys.argv = sys.argv[1:]
if sys.argv[0].endswith(".py"):
    sys.path.insert(0, sys.argv[0].rpartition("/")[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "packages", "extra"),
    [
        (["distil_kernels.train", "--runs_dir", "{folder}"], "package rich is", "train"),
        (["distil_kernels.train", "--config", "{folder}/x.yaml"], "package yaml is", "train"),
        (["distil_kernels.train", "eval", "smollm2"], "package accelerate is", "train"),
        (["studies.compare", "--quick"], "packages matplotlib and rich are", "studies"),
        (["studies.theory"], "packages matplotlib and rich are", "studies"),
        (["bench/run.py", "--render", "x.json", "--plot", "{folder}"], "package matplotlib is", "studies"),
        (["bench/roofline.py", "--plot", "{folder}"], "package matplotlib is", "studies"),
        (["bench/trainers.py", "--json", "{folder}/x.json"], "packages accelerate, rich and transformers are", "train"),
        (["bench/gpu/resources.py", "amd"], "package triton is", "dev"),
        (["examples/distil.py", "{folder}"], "package transformers is", "train"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_program_without_its_extra_says_what_to_install(command, packages, extra, tmp_path):
    process = run(*(each.format(folder=tmp_path) for each in command))
    assert process.returncode == 2, process.stderr
    (line,) = process.stderr.splitlines()
    assert line.endswith(f": the {packages} not installed: pip install 'distil-kernels[{extra}]'")
    assert process.stdout == "" and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "option"), [("distil_kernels.train", "--teacher"), ("bench/trainers.py", "--trainers")]
)
def test_help_needs_no_package(program, option):
    process = run(program, "--help")
    assert process.returncode == 0 and option in process.stdout


def test_another_missing_module_is_no_package_of_an_extra():
    assert missing_package(ModuleNotFoundError("No module named 'mine'", name="mine")) is None
    line = "the package peft is not installed: pip install 'distil-kernels[train]'"
    assert missing_package(ModuleNotFoundError("", name="peft.tuners")) == line


@pytest.mark.parametrize("extra", EXTRAS)
def test_extras_are_those_of_pyproject(extra):
    project = (ROOT / "pyproject.toml").read_text()
    (content,) = re.findall(rf"^{extra} = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL)
    distributions = {name for name in re.findall(r'"([a-zA-Z0-9_-]+)', content) if name != "distil-kernels"}
    names = packages_distributions()
    found = {each.lower().replace("_", "-") for module in EXTRAS[extra] for each in names.get(module, [])}
    assert found == distributions
