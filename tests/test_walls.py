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

# A module may import modules of its own level or of levels below it.
LEVELS = [
    {"_C"},
    {"backends"},
    {"gemm", "memory", "sparse"},
    {"credit", "gradients", "plan"},
    {"kept", "scaling"},
    {"driver"},
    {"checks"},
    {"ops"},
    {"call"},
    {"functional", "policy", "topk"},
    {"losses"},
    {"testing"},
    {"hf"},
    {"theory", "train"},
    {"compare"},
]


def sources(folder: str, *patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in (ROOT / folder).rglob(pattern))


def level(module: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if module in names)


def imports(path: Path) -> set[str]:
    """First name below distil_kernels of everything that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "distil_kernels" else [base]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("distil_kernels.")}
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


@pytest.mark.parametrize("path", sources("distil_kernels", "*.py"), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_one_way(path):
    if path.name == "__init__.py" and path.parent == PACKAGE:
        assert imports(path) <= {"functional", "losses", "policy", "topk"}
        return
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    known = {name for names in LEVELS for name in names}
    for imported in imports(path):
        if imported in known:  # a name of distil_kernels itself otherwise: its public functions
            assert level(imported) <= level(own), f"{own} imports {imported}"


@pytest.mark.parametrize("folder", ["train", "compare"])
def test_trainers_use_the_public_ops(folder):
    below = {name for names in LEVELS[: level("functional")] for name in names}
    for path in sources(f"distil_kernels/{folder}", "*.py"):
        assert not imports(path) & below, path


def test_kernel_library_needs_only_torch():
    """Importing the package pulls in no optional dependency and starts nothing."""
    code = (
        "import sys, distil_kernels; "
        "loaded = {'transformers', 'accelerate', 'peft', 'rich', 'matplotlib', 'hypothesis'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("folder", ["csrc", "python", "distil_kernels", "bench", "tests"])
def test_a_file_has_one_subject(folder):
    for path in sources(folder, "*.py", "*.cpp", "*.cu", "*.cuh", "*.h"):
        lines = len(path.read_text().splitlines())
        assert lines <= 450, f"{path.relative_to(ROOT)} has {lines} lines"
