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
    {"_C", "extras"},
    {"backends"},
    {"engine"},
    {"token_statistics", "losses", "policy", "plan"},
    {"distil"},
    {"topk"},
    {"explanation", "modules"},
    {"testing"},
    {"hf"},
    {"integrations", "train"},
]
ENGINE = [
    {"gpu_products"},
    {"gemm", "allocation", "gradient_threshold"},
    {"sizes", "policy"},
    {"credit", "gradients", "plan", "terms", "vocab_shards"},
    {"checks", "spec", "kept_gradient", "scaled_gradients"},
    {"placements", "term_checks"},
    {"driver"},
    {"topk"},
    {"custom_ops"},
    {"call"},
]
TRAIN = [
    {"imported", "tasks"},
    {"environments", "feedback.kinds", "feedback.siblings", "feedback.time_limit"},
    {"config"},
    {"presets"},
    {"command_line", "http_endpoint", "models", "optimizer"},
    {"run"},
    {"baseline", "rollouts"},
    {"feedback", "teachers"},
    {"batches", "mixture", "objective", "shared_rows"},
    {"evaluate", "metrics"},
    {"diagnostics", "report"},
    {"build"},
    {"recording"},
    {"commands", "serve_teacher", "trainer"},
    {"__main__"},
]
LATE = {"feedback.self_evaluation.SelfEvaluation"}
"""What a function of the table of feedback kinds imports when it is called: the options read the table without it."""
FLOORS = [("distil_kernels", LIBRARY), ("distil_kernels.engine", ENGINE), ("distil_kernels.train", TRAIN)]


def sources(folder: str, *patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in (ROOT / folder).rglob(pattern))


def floor(floors: list[set[str]], module: str) -> int | None:
    """The floor of a dotted name below the package, by the longest name that is listed; None for an unlisted one."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for index, names in enumerate(floors):
            if name in names:
                return index
    return None


def imports(path: Path, package: str) -> set[str]:
    """Dotted names below `package` that a file imports from it, wherever the import stands but for types alone."""
    names_below, nodes = set(), [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        names_below |= {name.removeprefix(f"{package}.") for name in names if name.startswith(f"{package}.")}
    return names_below


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


@pytest.mark.parametrize(("package", "floors"), FLOORS, ids=[package for package, _ in FLOORS])
def test_imports_flow_one_way(package, floors):
    folder = ROOT / package.replace(".", "/")
    for path in folder.rglob("*.py"):
        module = ".".join(path.relative_to(folder).with_suffix("").parts)
        if path.name == "__init__.py" and path.parent == folder:  # the package's public names
            continue
        this_floor = floor(floors, module)
        assert this_floor is not None, f"{path.relative_to(ROOT)} is on no floor: add it to this file"
        for imported in imports(path, package) - LATE:
            imported_floor = floor(floors, imported)  # None: a public function of the package itself
            assert imported_floor is None or imported_floor <= this_floor, (
                f"{path.relative_to(ROOT)} imports {imported}"
            )


@pytest.mark.parametrize("folder", ["distil_kernels/integrations", "distil_kernels/train", "studies"])
def test_trainers_use_the_public_ops(folder):
    below = {"_C", "backends", "engine"}
    for path in sources(folder, "*.py"):
        assert not {name.split(".")[0] for name in imports(path, "distil_kernels")} & below, path


def test_the_package_does_not_know_what_stands_outside():
    outside = re.compile(r"^\s*(from|import) (studies|bench|examples|tests)\b", re.MULTILINE)
    for path in sources("distil_kernels", "*.py"):
        assert not outside.search(path.read_text()), path


def test_kernel_library_needs_only_torch():
    """Importing the package pulls in no optional dependency and starts nothing."""
    code = (
        "import sys, distil_kernels; "
        "heavy = {'transformers', 'accelerate', 'peft', 'rich', 'matplotlib', 'hypothesis', 'trl'}; "
        "loaded = heavy & set(sys.modules); "
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
