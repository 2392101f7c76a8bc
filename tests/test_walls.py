"""The walls of CONTRIBUTING.md: each sentence there has its test here."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "distil_kernels"

# A module may import modules of its own floor or of floors below it. A name is a module or a package.
LIBRARY = [
    {"_C"},
    {"backends"},
    {"engine"},
    {"token_statistics", "losses", "policy", "plan"},
    {"distil"},
    {"topk"},
    {"explanation"},
    {"testing"},
    {"hf"},
    {"train"},
]
ENGINE = [
    {"gpu_products"},
    {"gemm", "memory", "sparse"},
    {"sizes", "policy"},
    {"credit", "gradients", "plan"},
    {"checks", "spec", "kept_gradient", "backward"},
    {"driver"},
    {"topk"},
    {"custom_ops"},
    {"call"},
]


def sources(folder: str, *patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in (ROOT / folder).rglob(pattern))


def floor(floors: list[set[str]], module: str) -> int:
    return next(index for index, names in enumerate(floors) if module in names)


def imports(path: Path, package: str) -> set[str]:
    """First name below `package` of everything that a file imports from it, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.removeprefix(f"{package}.").split(".")[0] for name in names if name.startswith(f"{package}.")}
    return found


@pytest.mark.parametrize("path", sources("csrc", "*.h", "*.cpp", "*.cu", "*.cuh"), ids=lambda p: p.name)
def test_csrc_knows_cpp_and_cuda_only(path):
    assert not re.search(r"#include\s*[<\"](torch|ATen|c10|Python|pybind11)", path.read_text())


@pytest.mark.parametrize("path", sources("python", "*.cpp"), ids=lambda p: p.name)
def test_bindings_know_only_pybind11_and_the_public_header(path):
    included = re.findall(r"#include\s*[<\"]([^>\"]+)", path.read_text())
    assert {name for name in included if "/" in name or name.endswith(".h")} == {
        "pybind11/pybind11.h",
        "distil_kernels.h",
    }


FLOORS = [("distil_kernels", LIBRARY), ("distil_kernels.engine", ENGINE)]


@pytest.mark.parametrize(("package", "floors"), FLOORS, ids=[package for package, _ in FLOORS])
def test_imports_flow_one_way(package, floors):
    folder = ROOT / package.replace(".", "/")
    known = set().union(*floors)
    for path in folder.rglob("*.py"):
        module = path.relative_to(folder).parts[0].removesuffix(".py")
        if module == "__init__":  # the package's public names
            continue
        assert module in known, f"{path.relative_to(ROOT)} is on no floor: add it to this file"
        for imported in imports(path, package) & known:  # another name is a public function of the package itself
            assert floor(floors, imported) <= floor(floors, module), f"{path.relative_to(ROOT)} imports {imported}"


@pytest.mark.parametrize("folder", ["distil_kernels/train", "studies"])
def test_trainers_use_the_public_ops(folder):
    below = {"_C", "backends", "engine"}
    for path in sources(folder, "*.py"):
        assert not imports(path, "distil_kernels") & below, path


def test_the_package_does_not_know_what_stands_outside():
    outside = re.compile(r"^\s*(from|import) (studies|bench|examples|tests)\b", re.MULTILINE)
    for path in sources("distil_kernels", "*.py"):
        assert not outside.search(path.read_text()), path


def test_kernel_library_needs_only_torch():
    """Importing the package pulls in no optional dependency and starts nothing."""
    code = (
        "import sys, distil_kernels; "
        "loaded = {'transformers', 'accelerate', 'peft', 'rich', 'matplotlib', 'hypothesis'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
